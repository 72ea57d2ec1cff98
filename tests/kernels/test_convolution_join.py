"""Two added 1 x 1 convolutions in one product against float64: the kernel in Triton's interpreter, and on GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from compilation import SHARED_LIMIT, compile_report, needs_triton
from fused_cases import assert_within_budget, poisoned_memory
from torch import Tensor

from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.convolution import ConvolutionWeights, JoinConfig, choose_join, convolution_join, join, lay_out
from fastmetro_kernels.convolution.join_configs import DEEP, KEEPING, MEASURED, SHALLOW, TILES, problem, tiles
from fastmetro_kernels.convolution.layout import as_conv2d

HALVES = (torch.float16, torch.bfloat16)
_ALL = [(device, "triton", dtype) for device in ("cpu", "cuda") for dtype in HALVES]
TRITON = [one for one in _ALL if not join.join_reasons(torch.device(one[0]), one[2])]
RUNNERS = [("cpu", "reference", torch.float32), *TRITON]
ON_CUDA = [one for one in TRITON if one[0] == "cuda"]
on_triton = pytest.mark.parametrize(("device", "backend", "dtype"), TRITON, ids=str)
on_cuda = pytest.mark.parametrize(("device", "backend", "dtype"), ON_CUDA, ids=str)
everywhere = pytest.mark.parametrize(("device", "backend", "dtype"), RUNNERS, ids=str)


class Shape(NamedTuple):
    """Images, height and width of the output; channels of both inputs and of the output; the second's stride, and how
    many pixels beyond its last one the second input goes on."""

    images: int
    height: int
    width: int
    channels: int
    second: int
    outputs: int
    stride: int = 1
    beyond: int = 0


SHAPES = [
    Shape(1, 8, 8, 64, 64, 256),
    Shape(2, 5, 7, 128, 256, 128, 2),
    Shape(3, 5, 3, 48, 32, 80, 2, 1),
    Shape(1, 1, 1, 16, 112, 16, 3, 2),
    Shape(5, 3, 5, 80, 16, 144, 1),
    Shape(2, 9, 8, 32, 96, 48, 2, 1),
]
SMALL = Shape(3, 7, 5, 96, 48, 160, 2, 1)


def guarded(x: Tensor) -> Tensor:
    """A copy in the same order of memory, with NaN in front and behind."""
    room = torch.full((x.numel() + 512,), torch.nan, dtype=x.dtype, device=x.device)
    inside = room[256 : 256 + x.numel()].as_strided(x.shape, x.stride(), 256)
    return inside.copy_(x)


def make(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ConvolutionWeights, Tensor]:
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    images, height, width, channels, more, outputs, stride, beyond = shape

    def normal(*size: int) -> Tensor:
        made = torch.randn(size, generator=generator, device=device).to(dtype)
        return guarded(made.contiguous(memory_format=torch.channels_last) if len(size) == 4 else made)

    depth = (channels + more) ** -0.5
    weight, more_weight, bias = normal(outputs, channels, 1, 1), normal(outputs, more, 1, 1), normal(outputs)
    weight, more_weight = weight.mul_(depth), more_weight.mul_(depth)
    weights = lay_out(weight, bias.float(), second=(more_weight, None, stride))
    sizes = [(size - 1) * stride + 1 + beyond for size in (height, width)]
    return normal(images, channels, height, width), weights, normal(images, more, *sizes)


def exact(x: Tensor, weights: ConvolutionWeights, second: Tensor, relu: bool = True) -> Tensor:
    assert weights.second_weight is not None
    y = F.conv2d(x.double(), as_conv2d(weights.weight).double(), weights.bias.double())
    y = y + F.conv2d(second.double(), as_conv2d(weights.second_weight).double(), None, weights.second_stride)
    return y.relu() if relu else y


def check(got: Tensor, x: Tensor, weights: ConvolutionWeights, second: Tensor, relu: bool = True) -> None:
    """Within twice the worst error of plain PyTorch and a rounding of each number, in channels_last."""
    assert got.dtype == x.dtype and got.is_contiguous(memory_format=torch.channels_last)
    want = exact(x, weights, second, relu)
    plain = convolution_join(x, weights, second, relu=relu, backend="reference")
    rounding = torch.finfo(x.dtype).eps * want.abs() + 1e-6
    assert_within_budget(*(one.permute(0, 2, 3, 1) for one in (got, want, plain, rounding)))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@everywhere
def test_against_float64(device: str, backend: str, dtype: torch.dtype, shape: Shape, relu: bool) -> None:
    x, weights, second = make(shape, device, dtype)
    with poisoned_memory():
        got = convolution_join(x, weights, second, relu=relu, backend=backend)
    check(got, x, weights, second, relu)


@pytest.mark.parametrize("tile", TILES, ids=str)
@on_triton
def test_every_tile(device: str, backend: str, dtype: torch.dtype, tile: JoinConfig) -> None:
    shape = SMALL._replace(channels=48, second=32) if tile.programs else SMALL  # whose weights can be kept
    x, weights, second = make(shape, device, dtype)
    with poisoned_memory():
        got = convolution_join(x, weights, second, config=tile, backend=backend)
    check(got, x, weights, second)
    assert torch.equal(got, convolution_join(x, weights, second, config=tile, backend=backend))
    if device == "cuda":  # whether config or backend is named
        assert torch.equal(got, convolution_join(x, weights, second, config=tile))


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@on_triton
def test_programs_that_keep_their_weights(device: str, backend: str, dtype: torch.dtype, shape: Shape) -> None:
    """More programs than tiles, and several tiles of a program; channels that are no power of 2."""
    for images in (shape.images, 40 * shape.images):
        x, weights, second = make(shape._replace(images=images), device, dtype)
        for tile in (JoinConfig(64, 64, 0, 4, 2, 1), JoinConfig(64, 64, 0, 4, 3, 2)):
            with poisoned_memory():
                got = convolution_join(x, weights, second, relu=False, config=tile, backend=backend)
            check(got, x, weights, second, relu=False)


@everywhere
def test_no_images(device: str, backend: str, dtype: torch.dtype) -> None:
    x, weights, second = make(SMALL, device, dtype)
    got = convolution_join(x[:0], weights, second[:0], backend=backend)
    assert got.shape == (0, 160, 7, 5) and got.dtype == dtype


@everywhere
def test_any_order(device: str, backend: str, dtype: torch.dtype) -> None:
    """Planes one behind the other, and images and pixels that are some of more."""
    x, weights, second = make(SMALL, device, dtype)
    want = convolution_join(x, weights, second, backend=backend)
    wide = x.repeat_interleave(2, 3)[..., ::2]
    for one, other in ((x.contiguous(), second.contiguous()), (wide, second.repeat_interleave(2, 0)[::2])):
        got = convolution_join(one, weights, other, backend=backend)
        check(got, one, weights, other)
        assert torch.equal(got, want) or backend == "reference"


@everywhere
def test_not_a_number_stays_at_its_position(device: str, backend: str, dtype: torch.dtype) -> None:
    """Of the second input's pixels those that the stride leaves out are not read."""
    x, weights, second = make(SMALL, device, dtype)
    x[1, 5, 2, 3], second[2, 7, 4, 6] = torch.nan, torch.nan
    second[:, :, 1::2] = torch.nan
    second[..., 1::2] = torch.nan
    got = convolution_join(x, weights, second, backend=backend)
    expected = torch.zeros_like(got, dtype=torch.bool)
    expected[1, :, 2, 3] = expected[2, :, 2, 3] = True
    assert torch.equal(got.isnan(), expected)


@on_triton
def test_opcheck(device: str, backend: str, dtype: torch.dtype) -> None:
    x, weights, second = make(SMALL, device, dtype)
    rows = [one.permute(0, 2, 3, 1) for one in (x, second)]
    op = torch.ops.fastmetro_kernels.convolution_join_triton.default
    given: list[Any] = [rows[0], weights.weight, weights.bias, rows[1], weights.second_weight, 2, True, list(TILES[0])]
    for tile in (TILES[0], JoinConfig(64, 64, 0, 4, 2, 1)):
        torch.library.opcheck(op, (*given[:-1], list(tile)))
    for place, wrong, message in (
        (0, x, "x must be contiguous|weight must be"),
        (0, rows[0].float(), "x must be float16 or bfloat16"),
        (1, weights.weight[:, :, :, :48].contiguous(), "weight must be"),
        (2, weights.bias.to(dtype), "bias must be float32"),
        (3, rows[1][:, :9].contiguous(), "second must give"),
        (4, weights.second_weight.float(), "second_weight must be"),  # type: ignore[union-attr]
        (7, [1, 2], "config: must be a JoinConfig"),
        (7, [100, 64, 64, 4, 2, 0], "config: rows must be one of 64, 128, 256, got 100"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*given[:place], wrong, *given[place + 1 :])


@pytest.mark.parametrize("dynamic", [False, True])
@everywhere
def test_compiles_as_one_graph(device: str, backend: str, dtype: torch.dtype, dynamic: bool) -> None:
    torch._dynamo.reset()
    _, weights, _ = make(SMALL, device, dtype)

    def block(x: Tensor, second: Tensor) -> Tensor:
        return convolution_join(x + 1, weights, second, backend=backend) * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for images in (2, 3):
        x, _, second = make(SMALL._replace(images=images), device, dtype)
        torch.testing.assert_close(compiled(x, second), block(x, second), rtol=0, atol=0)


def test_what_is_timed_and_measured_is_possible() -> None:
    for tile in (*TILES, *MEASURED.values()):
        assert problem(tile) is None, tile
    for channels, second, outputs in ((64, 64, 256), (128, 256, 512), (512, 1024, 2048), (16, 16, 16)):
        found = tiles(channels, second, outputs)
        assert len(set(found)) == len(found) <= 15 and not any(map(problem, found))
    assert tiles(64, 64, 256) == (*SHALLOW, *KEEPING) and tiles(512, 1024, 2048) == DEEP
    assert [tile.programs for tile in tiles(128, 256, 512) if tile.programs] == [1]  # more do not fit
    assert tiles(16, 16, 16) == tiles(512, 16, 16) == (JoinConfig(128, 64, 64, 4, 3),)
    assert problem(JoinConfig(64, 64, 64, 4, 2, 1)) == (
        "depth must be 0 if, and only if, programs is not, got 64 and 1"
    )
    assert problem(JoinConfig(256, 256, 64, 8, 5)) == (
        "(256, 256, 64, 8, 5, 0) needs 327680 bytes of shared memory, a multiprocessor has 232448"
    )


def test_only_what_was_measured_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, second = make(SMALL, "cpu", torch.float16)
    key = (3 * 7 * 5, 96, 48, 160, 2)
    monkeypatch.setitem(MEASURED, key, TILES[1])
    assert choose_join(x, weights, second) is None  # not on a CPU
    monkeypatch.setattr(join, "family_of", lambda device: "9.0")
    monkeypatch.setattr(join, "join_reasons", lambda device, dtype: [])
    assert choose_join(x, weights, second) == TILES[1]
    assert choose_join(x[:2], weights, second[:2]) is None
    monkeypatch.setattr(join, "family_of", lambda device: "10.0")
    assert choose_join(x, weights, second) is None
    monkeypatch.setattr(join, "family_of", lambda device: "9.0")
    monkeypatch.setattr(join, "join_reasons", lambda device, dtype: ["no"])
    assert choose_join(x, weights, second) is None


def test_errors_name_the_argument() -> None:
    x, weights, second = make(SMALL, "cpu", torch.float32)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        convolution_join([], weights, second)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights must come from lay_out, got tuple"):
        convolution_join(x, tuple(weights), second)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[N, 96, H, W\], got \[3, 95, 7, 5\]"):
        convolution_join(x[:, 1:], weights, second)
    with pytest.raises(
        ValueError, match=r"second must be \[3, 48, H2, W2\] that gives \[7, 5\], got \[3, 48, 12, 10\]"
    ):
        convolution_join(x, weights, second[:, :, 2:])
    with pytest.raises(TypeError, match=r"second must be one of float32, got torch\.float16"):
        convolution_join(x, weights, second.half())
    with pytest.raises(ValueError, match="second must be given if, and only if"):
        convolution_join(x, weights._replace(second_weight=None), second)
    with pytest.raises(ValueError, match=r"weights must be 1 x 1 of stride 1 .* of stride 2 and padding 0"):
        convolution_join(x, weights._replace(stride=2), second[:, :, :7, :5])
    with pytest.raises(TypeError, match="relu must be True or False, got 1"):
        convolution_join(x, weights, second, relu=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a JoinConfig, got tuple"):
        convolution_join(x, weights, second, config=(64, 64, 64, 4, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config: warps must be one of 4, 8, got 3"):
        convolution_join(x, weights, second, config=JoinConfig(64, 64, 64, 3, 2))
    kept = JoinConfig(128, 256, 0, 8, 3, 1)
    with pytest.raises(ValueError, match=r"config: \(128, 256, 0, 8, 3, 1\) needs 278528 bytes of shared memory"):
        convolution_join(x, weights, second, config=kept)
    with pytest.raises(ValueError, match="backend='native' is not known"):
        convolution_join(x, weights, second, backend="native")
    with pytest.raises(BackendUnavailable, match=r"takes float16 and bfloat16, got torch\.float32"):
        convolution_join(x, weights, second, backend="triton")
    with pytest.raises(BackendUnavailable, match="interpreter computes bfloat16 wrongly"):
        convolution_join(*make(SMALL, "cpu", torch.bfloat16), backend="triton")


@pytest.mark.parametrize("name", ["x", "second"])
def test_gradients_are_refused(name: str) -> None:
    x, weights, second = make(SMALL, "cpu", torch.float32)
    {"x": x, "second": second}[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"convolution_join is for inference.*but {name} requires grad"):
        convolution_join(x, weights, second)
    with torch.no_grad():
        convolution_join(x, weights, second)


@needs_triton
@pytest.mark.parametrize("layer", ["64 64 256 1", "512 1024 2048 2"])
def test_tiles_compile_for_asynchronous_tensor_cores(layer: str) -> None:
    """Also without a GPU: loads of 16 bytes that nobody waits for at once, wide stores, and nothing is spilled."""
    found = compile_report("compile_join.py", 90, "fp16", *layer.split())
    assert len(found) >= 10
    for name, used in found.items():
        assert used["stack"] == 0 and used["shared"] <= SHARED_LIMIT[90], (name, used)
        assert used["asynchronous"] and used["copies"] and not used["small_copies"], (name, used)
        assert used["wide_stores"] and used["waits"], (name, used)


@pytest.mark.parametrize("tile", TILES, ids=str)
@on_cuda
def test_every_tile_under_load(device: str, backend: str, dtype: torch.dtype, tile: JoinConfig) -> None:
    """Many programs at a time, call behind call: the same bits, and right."""
    channels = (64, 64) if tile.programs else (128, 256)
    x, weights, second = make(Shape(32, 28, 28, *channels, 512, 2, 1), device, dtype)
    first = convolution_join(x, weights, second, config=tile, backend=backend)
    check(first, x, weights, second)
    for _ in range(50):
        assert torch.equal(convolution_join(x, weights, second, config=tile, backend=backend), first)


@pytest.mark.parametrize(
    "shape",
    [Shape(256, 56, 56, 64, 64, 256), Shape(256, 28, 28, 128, 256, 512, 2, 1), Shape(256, 7, 7, 512, 1024, 2048, 2, 1)],
    ids=str,
)
@on_cuda
def test_full_size(device: str, backend: str, dtype: torch.dtype, shape: Shape) -> None:
    x, weights, second = make(shape, device, dtype)
    with poisoned_memory():
        got = convolution_join(x, weights, second, backend=backend)
    assert bool(got.isfinite().all())
    ends = slice(None, None, 51)  # both ends and images between them
    check(got[ends].contiguous(memory_format=torch.channels_last), x[ends], weights, second[ends])


@on_cuda
def test_more_numbers_than_32_bits_count(device: str, backend: str, dtype: torch.dtype) -> None:
    shape = Shape(2800, 56, 56, 16, 16, 256)
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    x, weights, second = make(shape, device, dtype)
    got = convolution_join(x, weights, second, backend=backend)
    assert got.numel() > 2**31
    for images in (slice(0, 1), slice(2674, 2677), slice(-1, None)):  # 2**31 is in image 2674.9
        check(got[images], x[images], weights, second[images])


@on_cuda
def test_in_a_graph_with_new_weights(device: str, backend: str, dtype: torch.dtype) -> None:
    x, weights, second = make(Shape(8, 14, 14, 256, 512, 1024, 2, 1), device, dtype)
    convolution_join(x, weights, second, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = convolution_join(x * 0.5, weights, second, backend=backend)
    for _ in range(3):
        weights.weight.mul_(0.5), weights.bias.add_(1)
        torch.cuda.synchronize()
        for _ in range(10):
            got.fill_(torch.nan)
            graph.replay()
            check(got, x * 0.5, weights, second)
