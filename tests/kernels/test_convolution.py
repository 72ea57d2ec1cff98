"""The fused convolution against float64, on every backend that is here; the yardstick is cuDNN's error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.convolution import ConvolutionConfig, ConvolutionWeights, convolution, lay_out, ops
from fastmetro_kernels.convolution.api import layer_of
from fastmetro_kernels.convolution.configs import Shape, box_bytes, pinned, problem, usable
from fastmetro_kernels.convolution.layout import as_conv2d

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
RUNNERS = [("cpu", "reference", torch.float32)]
if HOPPER:
    HALVES = (torch.float16, torch.bfloat16)
    RUNNERS += [("cuda", backend, dtype) for backend in ("reference", "native") for dtype in HALVES]
SHAPES = [  # images, height, width, channels in and out, kernel, stride
    (1, 56, 56, 64, 64, 1, 1),
    (1, 56, 56, 64, 64, 3, 1),
    (1, 56, 56, 128, 128, 3, 2),
    (1, 7, 7, 512, 512, 3, 1),
    (2, 14, 14, 256, 1024, 1, 1),
    (3, 13, 9, 48, 80, 3, 1),
    (3, 13, 9, 16, 32, 3, 2),
    (5, 1, 1, 16, 16, 1, 1),
    (2, 12, 17, 112, 48, 1, 2),
    (16, 8, 8, 64, 96, 5, 1),
]


def make(shape, device, dtype, residual: bool = False, second: bool = False, seed: int = 0):
    """x, weights, residual, second, and the exact result in front of the ReLU."""
    n, height, width, c, k, kernel, stride = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x = normal(n, c, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(k, c, kernel, kernel) / (c * kernel * kernel) ** 0.5, normal(k)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
    more = kept = branch = None
    if second:
        more_weight, more_bias = normal(k, 32, 1, 1) / 32**0.5, normal(k)
        branch = normal(n, 32, exact.shape[2] * 2 - 1, exact.shape[3] * 2).contiguous(memory_format=torch.channels_last)
        more = (more_weight, more_bias, 2)
        exact = exact + F.conv2d(branch.double(), more_weight.double(), more_bias.double(), 2)
    if residual:
        kept = normal(*exact.shape).contiguous(memory_format=torch.channels_last)
        exact = exact + kept.double()
    return x, lay_out(weight, bias, stride, second=more), kept, branch, exact


def budget(x, weights: ConvolutionWeights, exact) -> float:
    """Twice the error of PyTorch's convolution with one more rounding of the output."""
    if x.dtype == torch.float32:
        return 1e-5 * float(exact.norm())
    rounded = exact.to(x.dtype).double()
    return 3 * float((rounded - exact).norm()) + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("residual", "second", "relu"),
    [(False, False, True), (True, False, True), (False, False, False), (True, True, True)],
)
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNNERS, ids=str)
def test_against_float64(shape, residual, second, relu, device, backend, dtype) -> None:
    x, weights, kept, branch, exact = make(shape, device, dtype, residual, second)
    got = convolution(x, weights, residual=kept, second=branch, relu=relu, backend=backend)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    want = exact.relu() if relu else exact
    slack = 3 if backend == "reference" and (residual or second) else 1  # one rounding for each term
    assert float((got.double() - want).norm()) <= slack * budget(x, weights, want)


@pytest.mark.parametrize("shape", [(1, 7, 7, 128, 64, 1, 1), (3, 5, 4, 48, 80, 3, 1), (2, 9, 6, 16, 32, 1, 2)], ids=str)
@pytest.mark.parametrize(("scale", "residual", "relu"), [(2, True, True), (3, False, True), (8, True, False)])
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNNERS, ids=str)
def test_repeated_results(shape, scale: int, residual: bool, relu: bool, device, backend, dtype) -> None:
    x, weights, _, branch, exact = make(shape, device, dtype, second=True)
    exact = exact.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    kept = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype) if residual else None
    want = exact if kept is None else exact + kept.double()
    want = want.relu() if relu else want
    configs = [None] if backend == "reference" else usable(Shape(x.shape[0] * 49, shape[4], 9), scale)[:12]
    for config in configs:
        if config is not None and config.split > 1 + shape[5] ** 2:
            continue
        torch.full(want.shape, torch.nan, dtype=dtype, device=device)
        got = convolution(
            x, weights, residual=kept, second=branch, relu=relu, scale=scale, config=config, backend=backend
        )
        assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
        slack = 3 if backend == "reference" else 1
        assert float((got.double() - want).norm()) <= slack * budget(x, weights, want), config


@pytest.mark.parametrize(
    "shape", [(1, 7, 7, 128, 64, 1, 1), (3, 13, 9, 144, 80, 3, 1), (2, 12, 8, 64, 128, 3, 2)], ids=str
)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNNERS, ids=str)
def test_a_residual_behind_the_relu(shape, second: bool, scale: int, device, backend, dtype) -> None:
    x, weights, _, branch, exact = make(shape, device, dtype, second=second)
    want = exact.relu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    kept = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    before = kept.clone()
    want = want + kept.double()
    size = layer_of(x, weights, kept, branch, scale).shape
    for config in [None] if backend == "reference" else [None, *usable(size, scale)]:
        torch.full(want.shape, torch.nan, dtype=dtype, device=device)
        got = convolution(
            x, weights, residual=kept, second=branch, late=True, scale=scale, config=config, backend=backend
        )
        assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
        slack = 3 if backend == "reference" else 1
        assert float((got.double() - want).norm()) <= slack * budget(x, weights, want), config
    assert torch.equal(kept, before), "the residual was written to"


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 56, 56), (2, 28, 28), (1, 14, 14), (3, 7, 7), (2, 1, 1), (3, 2, 2), (1, 1, 30), (2, 9, 40)]
)
@pytest.mark.parametrize("channels", [(64, 64), (48, 80), (512, 32)])
def test_one_copy_for_all_taps(size, channels, residual: bool, dtype) -> None:
    x, weights, kept, _, exact = make((*size, *channels, 3, 1), "cuda", dtype, residual)
    shape = Shape(exact[:, 0].numel(), channels[1], 9 * -(-channels[0] // 64), box_bytes(*size[1:]))
    configs = [config for config in usable(shape) if config.once]
    assert configs
    for config in configs:
        for early in (True, False):
            chosen = config._replace(early=early)
            torch.full(exact.shape, torch.nan, dtype=dtype, device="cuda")
            got = convolution(x, weights, residual=kept, config=chosen, backend="native")
            assert float((got.double() - exact.relu()).norm()) <= budget(x, weights, exact.relu()), chosen


@GPU
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile(shape) -> None:
    x, weights, kept, branch, exact = make(shape, "cuda", torch.float16, True, True)
    n, k = len(x), weights.weight.shape[0]
    taps, channels = shape[5] ** 2, shape[3]
    size = Shape(n * exact.shape[2] * exact.shape[3], k, taps * -(-channels // 64) + 1)
    want = exact.relu()
    for config in usable(size):
        for early in (True, False):
            chosen = config._replace(early=early)
            got = convolution(x, weights, residual=kept, second=branch, config=chosen, backend="native")
            assert float((got.double() - want).norm()) <= budget(x, weights, want), config


@GPU
@pytest.mark.parametrize("config", [ConvolutionConfig(64, 1, 2), ConvolutionConfig(32, 4, 2, once=True)], ids=str)
def test_blocks_alone_on_a_multiprocessor_give_the_same_bits(config: ConvolutionConfig) -> None:
    """In a chain, where kernels start beside the one in front; also of more blocks than there is room for at a time."""
    for images in (1, 40):
        x, weights, _, _, _ = make((images, 14, 14, 256, 256, 3, 1), "cuda", torch.float16)
        chains = []
        for alone in (False, True):
            got = x
            for _ in range(6):
                torch.full(got.shape, torch.nan, dtype=torch.float16, device="cuda")
                got = convolution(got, weights, backend="native", config=config._replace(alone=alone))
            chains.append(got)
        assert torch.equal(*chains) and bool(chains[0].isfinite().all())


@GPU
def test_the_same_bits_a_thousand_times_and_in_a_chain() -> None:
    """Kernels that start early wait for the one in front; every output is poisoned before."""
    shape = (1, 14, 14, 256, 256, 3, 1)
    x, weights, _, _, _ = make(shape, "cuda", torch.float16)
    with torch.no_grad():
        expected = x
        for _ in range(6):
            expected = convolution(expected, weights, backend="native", config=ConvolutionConfig(64, 4, 4, early=False))
        for _ in range(1000):
            got = x
            for _ in range(6):
                torch.full((1, 14, 14, 256), torch.nan, dtype=torch.float16, device="cuda")
                got = convolution(got, weights, backend="native", config=ConvolutionConfig(64, 4, 4, early=True))
            assert torch.equal(got, expected)


@GPU
def test_a_thousand_replays_on_two_streams_at_once() -> None:
    """Every replay gives the same bits; what the one before wrote is poisoned in front of each."""
    replays, inputs = [], []
    for seed in (0, 1):
        x, weights, kept, _, exact = make((1, 28, 28, 128, 512, 1, 1), "cuda", torch.float16, True, seed=seed)
        first = convolution(x, weights, residual=kept, backend="native")
        want = exact.relu()
        assert float((first.double() - want).norm()) <= 3 * float((want.half().double() - want).norm())
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            outputs = [convolution(x, weights, residual=kept, backend="native") for _ in range(20)]
        inputs.append((x, weights, kept))  # a graph does not keep them
        replays.append((graph, stream, outputs, first, torch.zeros((), dtype=torch.int64, device="cuda")))
    torch.cuda.synchronize()
    for _ in range(1000):
        for graph, stream, outputs, first, differing in replays:
            with torch.cuda.stream(stream):
                torch._foreach_mul_(outputs, torch.nan)
                graph.replay()
                differing += torch.stack([(y != first).sum() for y in outputs]).sum()
    torch.cuda.synchronize()
    assert [int(differing) for *_, differing in replays] == [0, 0]


@GPU
@pytest.mark.parametrize("config", [ConvolutionConfig(64, 4, 4), ConvolutionConfig(128, 1, 4, groups=2)], ids=str)
def test_blocks_note_their_times(config: ConvolutionConfig) -> None:
    x, weights, _, _, _ = make((1, 28, 28, 64, 128, 3, 1), "cuda", torch.float16)
    rows = x.permute(0, 2, 3, 1).contiguous()
    arguments = (rows, weights.weight, weights.bias, None, None, None, 1, 1, 1, True, False)
    out, times = ops.convolution_timeline_native(*arguments, list(map(int, config)))
    assert torch.equal(out, ops.convolution_native(*arguments, 1, list(map(int, config))))
    blocks = config.split * -(-784 // (64 * config.groups)) * -(-128 // config.columns)
    assert times.shape == (blocks, len(ops.STAMPS))
    spans = times[:, :-1].diff(dim=1)
    assert bool((spans >= 0).all()) and bool((spans.sum(1) < 1e8).all())
    assert bool((times[:, -1] >= 0).all()) and int(times[:, -1].max()) < 1000


def test_configurations() -> None:
    shape = Shape(49, 512, 72)
    for config in usable(shape):
        assert problem(config, shape.chunks) is None
    assert pinned(shape).split == 8 and pinned(Shape(3136, 256, 1)).split == 1
    wide = Shape(50000, 512, 4)
    assert pinned(wide).columns == 128 and problem(pinned(wide), 4, 2) and problem(pinned(wide, 2), 4, 2) is None
    assert problem(ConvolutionConfig(48, 1, 2), 9) == "columns must be one of (32, 64, 128), got 48"
    assert "split must be at most the 3 chunks" in str(problem(ConvolutionConfig(32, 4, 2), 3))
    assert "stages must be 2 to 16" in str(problem(ConvolutionConfig(128, 1, 16), 99))
    once = [config for config in usable(Shape(196, 256, 36, box_bytes(14, 14))) if config.once]
    assert once and all(problem(config, 36, box=box_bytes(14, 14)) is None for config in once)
    single = once[0]._replace(split=2, stages=1)
    assert "stages must be at least 2" in str(problem(single, 36, box=box_bytes(14, 14)))
    assert problem(single, 18, box=box_bytes(14, 14)) is None
    assert "once needs a 3 x 3" in str(problem(once[0], 36)) and "at most the 4 chunks" in str(
        problem(once[0]._replace(split=8), 36, box=box_bytes(14, 14))
    )


def test_boxes_hold_all_neighbours() -> None:
    """The index arithmetic of near.cuh: rows of a box, where a tap's product begins, and which results are stored."""
    for height, width in ((7, 7), (2, 2), (1, 1), (5, 13), (28, 28), (1, 30), (30, 1), (56, 56)):
        x, weight = torch.randn(1, 2, height, width).double(), torch.randn(3, 2, 3, 3).double()
        want, pitch = F.conv2d(x, weight, padding=1)[0], width + 1
        rows = box_bytes(height, width) // (pitch * 128)
        got = torch.full_like(want, torch.nan)
        for position in range(0, height * pitch, 64):
            first = (position - 1) // pitch - 1
            box = F.pad(x[0], (0, 1, rows, rows))[:, rows + first : 2 * rows + first].flatten(1)
            inside = position - first * pitch
            sums = torch.zeros(3, 64).double()
            for tap in range(9):
                at = inside + (tap // 3 - 1) * pitch + tap % 3 - 1
                assert at >= 0 and at + 64 <= box.shape[1]
                sums += weight[:, :, tap // 3, tap % 3] @ box[:, at : at + 64]
            for number in range(64):
                y, column = divmod(position + number, pitch)
                if y < height and column < width:
                    got[:, y, column] = sums[:, number]
        torch.testing.assert_close(got, want)


def test_weights_are_laid_out_once() -> None:
    weight, bias = torch.randn(32, 16, 3, 3), torch.randn(32)
    weights = lay_out(weight, bias, 2)
    assert torch.equal(as_conv2d(weights.weight), weight) and weights.padding == 1
    more = (torch.randn(32, 48, 1, 1), torch.randn(32), 2)
    assert torch.equal(lay_out(weight, bias, second=more).bias, bias + more[1])
    for arguments, message in (
        ((torch.randn(30, 16, 3, 3), torch.randn(30)), "multiples of 16"),
        ((torch.randn(32, 16, 2, 2), bias), "padding must be given"),
        ((weight, bias, 9), "stride must be 1 to 8"),
        ((weight, bias, 1, 3), "less than the kernel's 3 x 3, got 3"),
        ((weight, torch.randn(3)), "bias"),
        ((weight, bias, 1, 1, (torch.randn(32, 16, 3, 3), bias, 1)), "second must be a 1 x 1"),
    ):
        with pytest.raises(ValueError, match=message):
            lay_out(*arguments)


def test_bad_input_is_named() -> None:
    x, weights, kept, branch, _ = make((1, 6, 6, 16, 32, 3, 1), "cpu", torch.float32, True, True)
    with pytest.raises(ValueError, match=r"x must be \[N, 16, H, W\]"):
        convolution(torch.randn(1, 32, 6, 6), weights, residual=kept, second=branch)
    with pytest.raises(ValueError, match="residual must be"):
        convolution(x, weights, residual=kept[:, :16], second=branch)
    with pytest.raises(ValueError, match="second must be given if"):
        convolution(x, weights, residual=kept)
    with pytest.raises(ValueError, match="late needs a residual and relu=True, got no residual"):
        convolution(x, weights, second=branch, late=True)
    with pytest.raises(ValueError, match="late needs a residual and relu=True, got relu=False"):
        convolution(x, weights, residual=kept, second=branch, relu=False, late=True)
    with pytest.raises(ValueError, match="scale must be a whole number of 1 to 32, got 0"):
        convolution(x, weights, second=branch, scale=0)
    with pytest.raises(TypeError, match="must come from lay_out"):
        convolution(x, weights.weight)
    with pytest.raises(RuntimeError, match="has no gradients"):
        convolution(x.requires_grad_(), weights, residual=kept, second=branch)
    with pytest.raises(BackendUnavailable, match="runs on CUDA devices only"):
        convolution(x.detach(), weights, residual=kept, second=branch, backend="native")


def test_compiles_as_one_graph() -> None:
    x, weights, kept, branch, _ = make((2, 6, 6, 16, 32, 3, 1), "cpu", torch.float32, True, True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return convolution(x, weights, residual=kept, second=branch) + 1

    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


@GPU
def test_ops_keep_their_schemas() -> None:
    x, weights, kept, branch, _ = make((2, 6, 6, 16, 32, 3, 1), "cuda", torch.float16, True, True)
    rows = [one.permute(0, 2, 3, 1).contiguous() for one in (x, kept, branch)]
    arguments = (rows[0], weights.weight, weights.bias, rows[1], rows[2], weights.second_weight, 1, 1, 2, True, False)
    config = [32, 2, 2, 1, 1, 0, 0]
    torch.library.opcheck(torch.ops.fastmetro_kernels.convolution_native, (*arguments, 1, config))
    compiled = torch.compile(lambda x: convolution(x, weights, residual=kept, second=branch, backend="native") + 1)
    want = convolution(x, weights, residual=kept, second=branch, backend="native") + 1
    torch.testing.assert_close(compiled(x), want)
