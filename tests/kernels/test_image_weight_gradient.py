"""image_weight_gradient against float64 on every backend, device and dtype; what it refuses; how it compiles."""

from __future__ import annotations

import pytest
import torch
from compilation import compile_report, needs_triton
from fused_cases import DOUBLE, HALF, Runner, everywhere, on_cuda, on_each_backend, on_triton, poisoned_memory, randn
from torch import Tensor

from fastmetro_kernels.image_weight_gradient import ImageWeightGradientConfig, image_weight_gradient, ops
from fastmetro_kernels.image_weight_gradient.plan import CONFIGS, PINNED, shares

LAST = torch.channels_last
Sizes = tuple[tuple[int, int, int, int], int, int, int, int]  # of x; O, kernel, stride, padding
SMALL: list[Sizes] = [
    ((2, 3, 20, 23), 64, 7, 2, 3), ((3, 3, 9, 8), 64, 3, 2, 1), ((1, 4, 9, 11), 32, 5, 1, 0),
    ((1, 3, 7, 7), 16, 7, 2, 3), ((2, 1, 3, 3), 16, 1, 1, 0), ((1, 3, 1, 1), 16, 7, 2, 3),
    ((2, 10, 6, 5), 16, 3, 3, 2), ((1, 3, 5, 40), 32, 7, 1, 3),
]  # fmt: skip
LARGE: list[Sizes] = [
    ((32, 3, 224, 224), 64, 7, 2, 3),
    ((5, 3, 225, 119), 64, 7, 2, 3),
    ((16, 3, 256, 256), 64, 3, 2, 1),
]


def given(runner: Runner, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """x and the gradient of the result, in channels_last."""
    shape, outputs, kernel, stride, padding = sizes
    size = [(one + 2 * padding - kernel) // stride + 1 for one in shape[2:]]
    x, grad = randn(runner, *shape), randn(runner, shape[0], outputs, *size, seed=1)
    return x.contiguous(memory_format=LAST), grad.contiguous(memory_format=LAST)


def options(sizes: Sizes) -> dict[str, int]:
    return dict(zip(("kernel", "stride", "padding"), sizes[2:], strict=True))


def plainly(x: Tensor, grad: Tensor, sizes: Sizes) -> Tensor:
    """By PyTorch, in float32 where its bfloat16 is wrong: images narrower than the stride, on CPUs with AMX."""
    narrow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] < sizes[3]
    dtype = torch.float32 if narrow else x.dtype
    shape = [sizes[1], x.shape[1], sizes[2], sizes[2]]
    found: Tensor = torch.nn.grad.conv2d_weight(x.to(dtype), shape, grad.to(dtype), sizes[3], sizes[4])  # type: ignore[no-untyped-call]
    return found.to(x.dtype)


def check(runner: Runner, sizes: Sizes, config: ImageWeightGradientConfig | None = None) -> None:
    x, grad = given(runner, sizes)
    with poisoned_memory():
        got = image_weight_gradient(x, grad, **options(sizes), config=config, backend=runner.backend)
    assert got.dtype == runner.dtype and got.is_contiguous(memory_format=LAST)
    assert got.shape == (sizes[1], x.shape[1], sizes[2], sizes[2])
    exact = image_weight_gradient(x.double(), grad.double(), **options(sizes), backend="reference")
    plain = plainly(x, grad, sizes)
    allowed = 2 * (plain.double() - exact).abs().amax()
    rounding = torch.finfo(runner.dtype).eps * exact.abs() + 1e-6 * grad.numel() ** 0.5
    if runner.dtype == DOUBLE:
        rounding = 1e-12 * (1 + exact.abs())
    if runner.backend == "reference" and runner.dtype in (HALF, torch.bfloat16):  # PyTorch's own, of other strides
        sizes_of_terms = image_weight_gradient(
            x.double().abs(), grad.double().abs(), **options(sizes), backend="reference"
        )
        rounding = rounding + torch.finfo(runner.dtype).eps * sizes_of_terms
    assert bool(((got.double() - exact).abs() <= allowed + rounding).all())


@everywhere
def test_against_float64(runner: Runner) -> None:
    for sizes in SMALL + (LARGE if runner.device == "cuda" and runner.dtype in (HALF, torch.bfloat16) else []):
        check(runner, sizes)


@pytest.mark.parametrize("sizes", [((2, 3, 8, 1), 16, 7, 2, 3), ((1, 4, 1, 2), 16, 5, 3, 2)], ids=["1 of 2", "2 of 3"])
def test_images_narrower_than_the_stride(sizes: Sizes) -> None:
    runner = Runner("cpu", "reference", torch.bfloat16)
    for size in (16, 64, 256, 1024, 4096):  # so that freed memory, which oneDNN would read, holds NaN
        torch.full((size,), float("nan"), dtype=torch.bfloat16)
        check(runner, sizes)


@on_triton
@pytest.mark.parametrize(
    "config", [*CONFIGS, ImageWeightGradientConfig(32, 4, 3), ImageWeightGradientConfig(256, 8, 1)]
)
def test_every_tile(runner: Runner, config: ImageWeightGradientConfig) -> None:
    if runner.device == "cuda" and runner.dtype == torch.float32 and config.positions > 64:
        pytest.skip("more shared memory than there is")
    check(runner, ((2, 3, 21, 24), 64, 7, 2, 3), config)


@on_each_backend
def test_other_memory_formats_and_strides(runner: Runner) -> None:
    x, grad = given(runner, SMALL[0])
    expected = image_weight_gradient(x, grad, **options(SMALL[0]), backend=runner.backend)
    wide = torch.stack([grad, grad], -1)[..., 1]
    got = image_weight_gradient(x.contiguous(), wide, **options(SMALL[0]), backend=runner.backend)
    assert torch.equal(got, expected)


@on_each_backend
def test_what_is_no_number_spreads_to_what_it_touches(runner: Runner) -> None:
    """A NaN in the gradient to its channel of the result; one in the padding's place nowhere."""
    x, grad = given(runner, SMALL[0])
    grad[1, 5, 2, 3] = torch.nan
    got = image_weight_gradient(x, grad, **options(SMALL[0]), backend=runner.backend)
    assert bool(got[5].isnan().all()) and not bool(got[torch.arange(64) != 5].isnan().any())
    for sizes in (SMALL[0], ((2, 3, 20, 24), 16, 7, 2, 3)):
        x, grad = given(runner, sizes)
        x[1, 2, 19, 5] = torch.nan
        found = [image_weight_gradient(x, grad, **options(sizes), backend=name).isnan()
                 for name in (runner.backend, "reference")]  # fmt: skip
        assert torch.equal(*found) and 0 < int(found[0].sum()) < found[0].numel()


@on_triton
def test_64_bits(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmetro_kernels.image_weight_gradient import triton

    monkeypatch.setattr(triton, "_INT32_NUMBERS", 0)
    for sizes in SMALL[:3]:
        check(runner, sizes)


@on_cuda
def test_more_numbers_than_32_bits_count(runner: Runner) -> None:
    """The gradient is 0 but in a corner of the last image, which is taken alone, too."""
    if runner.dtype != HALF or torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("one dtype is enough, and it takes 6 GB")
    x = torch.empty(172, 3, 896, 896, dtype=HALF, device="cuda", memory_format=LAST).normal_()
    grad = torch.zeros(172, 64, 448, 448, dtype=HALF, device="cuda").to(memory_format=LAST)
    grad[-1, :, -9:, -9:].normal_()
    assert grad.numel() > 2**31
    found = [image_weight_gradient(*of, kernel=7, stride=2, padding=3, backend="triton")
             for of in ((x, grad), (x[-1:], grad[-1:]))]  # fmt: skip
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
    assert float(found[0].abs().max()) > 1


@on_cuda
def test_equal_calls_give_equal_bits_and_in_a_graph(runner: Runner) -> None:
    x, grad = given(runner, LARGE[1])
    first = image_weight_gradient(x, grad, **options(LARGE[1]), backend="triton")
    for _ in range(5):
        assert torch.equal(image_weight_gradient(x, grad, **options(LARGE[1]), backend="triton"), first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = image_weight_gradient(x, grad, **options(LARGE[1]), backend="triton")
    grad.copy_(grad.flip(0).clone())
    graph.replay()
    assert torch.equal(captured, image_weight_gradient(x, grad, **options(LARGE[1]), backend="triton"))


@on_triton
def test_opcheck_and_compile(runner: Runner) -> None:
    x, grad = given(runner, SMALL[1])
    torch.library.opcheck(ops.image_weight_gradient_triton, (x, grad, 3, 2, 1, ()))
    call = lambda x, grad: image_weight_gradient(x, grad, **options(SMALL[1]), backend="triton")  # noqa: E731
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert torch.equal(compiled(x, grad), call(x, grad))


@pytest.mark.parametrize("positions", [0, 1, 31, 64, 8448, 16896, 401408])
def test_positions_are_shared_out_once(positions: int) -> None:
    for config in (*CONFIGS, ImageWeightGradientConfig(32, 4, 1)):
        programs, each = shares(positions, config)
        assert programs <= config.programs and each % config.positions == 0
        assert programs * each >= positions and (programs - 1) * each < max(positions, 1)


def test_auto_leaves_the_rest_to_the_library() -> None:
    x, grad = torch.randn(1, 3, 9, 9), torch.randn(1, 24, 5, 5)
    got = image_weight_gradient(x, grad, kernel=3, stride=2, padding=1)
    expected = torch.nn.grad.conv2d_weight(x, (24, 3, 3, 3), grad, 2, 1)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="backend 'triton': grad must have 16, 32, 64 channels, got 24"):
        image_weight_gradient(x, grad, kernel=3, stride=2, padding=1, backend="triton")


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), (80, "fp16")])
def test_kernels_compile_for_tensor_cores(capability: int, dtype: str) -> None:
    found = compile_report("compile_image_weight_gradient.py", capability, dtype, 64)
    for name, used in found.items():
        assert used["waits"] == (capability >= 90), (name, used)
        if name.startswith("sums"):
            assert used["products"] and used["wgmma"] == (capability >= 90), (name, used)
    pinned = found[f"sums {PINNED.positions} x {PINNED.warps}"]
    if capability >= 90:  # the tile is for Hopper, and two programs a multiprocessor
        assert pinned["stack"] == 0 and 2 * 32 * PINNED.warps * pinned["registers"] <= 2**16, pinned


X, G = torch.zeros(2, 3, 8, 8), torch.zeros(2, 16, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        ((X[0], G), {}, ValueError, r"x must be \[B, C, H, W\] and not empty, got \[3, 8, 8\]"),
        ((X, G[:1]), {}, ValueError, r"grad must be \[2, O, 4, 4\], got \[1, 16, 4, 4\]"),
        ((X, G.half()), {}, TypeError, "grad must be one of float32"),
        ((X.int(), G), {}, TypeError, "x must be one of"),
        ((X, None), {}, TypeError, "grad must be a tensor"),
        ((X, G), {"kernel": 0}, ValueError, "kernel must be at least 1, got 0"),
        ((X, G), {"stride": 2.0}, TypeError, "stride must be an int, got 2.0"),
        ((X, G), {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ((X, G), {"config": (64, 8, 1)}, TypeError, "config must be a ImageWeightGradientConfig, got tuple"),
        ((X, G), {"config": ImageWeightGradientConfig(48, 8)}, ValueError, "positions must be one of 32, 64, 128, 256"),
        ((X, G), {"backend": "cudnn"}, ValueError, "backend='cudnn' is not known"),
        ((X.requires_grad_(), G), {}, RuntimeError, "x requires grad"),
    ],
)  # fmt: skip
def test_refused(
    arguments: tuple[object, ...], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    named = {"kernel": 3, "stride": 2, "padding": 1} | changes
    X.requires_grad_(error is RuntimeError)
    with pytest.raises(error, match=message):
        image_weight_gradient(*arguments, **named)  # type: ignore[arg-type]
