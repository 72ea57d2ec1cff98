"""max_pool and its gradients against PyTorch's on every backend, device and dtype; what it refuses; how it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compilation import compile_report, needs_triton
from fused_cases import (
    DOUBLE,
    FLOAT,
    HALF,
    Runner,
    everywhere,
    on_cuda,
    on_each_backend,
    on_triton,
    poisoned_memory,
    randn,
    surrounded,
)
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.max_pool import MaxPoolConfig, max_pool, max_pool_twice, ops
from fastmetro_kernels.max_pool.plan import CONFIGS, plan

LAST = torch.channels_last
INF, NAN = torch.inf, torch.nan
# B, C, H, W: one position, odd and even sizes, one row or column, channels of several programs, tiles over two images.
SMALL = [(1, 1, 1, 1), (2, 3, 7, 9), (1, 5, 1, 4), (3, 33, 4, 1), (2, 64, 5, 6), (1, 130, 9, 2), (0, 3, 4, 4)]
LARGE = [(32, 64, 112, 112), (3, 48, 57, 113), (3, 24, 61, 67), (2, 72, 56, 56)]


def drawn(runner: Runner, shape: tuple[int, ...], *values: float) -> Tensor:
    """Some of these values at random."""
    generator = torch.Generator().manual_seed(len(values) + sum(shape))
    choice = torch.randint(len(values), shape, generator=generator)
    return torch.tensor(values, dtype=DOUBLE)[choice].to(runner.device, runner.dtype).contiguous(memory_format=LAST)


KINDS: dict[str, Callable[[Runner, tuple[int, ...]], Tensor]] = {
    "normal": lambda runner, shape: randn(runner, *shape).contiguous(memory_format=LAST),
    "ties": lambda runner, shape: drawn(runner, shape, 0.0, 1.0, 2.0),
    "zeros": lambda runner, shape: drawn(runner, shape, 0.0, -0.0),
    "negative": lambda runner, shape: drawn(runner, shape, -1.0, -2.0, -3.0),
    "nan": lambda runner, shape: drawn(runner, shape, NAN, 1.0, 2.0, 3.0, -1.0),
    "mostly -inf": lambda runner, shape: drawn(runner, shape, *[-INF] * 19, 1.0),
    "all": lambda runner, shape: drawn(runner, shape, *[-INF] * 9, *[NAN] * 3, INF, 0.0, -2.0),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def exact(x: Tensor, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's maxima, the gradient of x in float64, and that of the gradients' sizes, on the CPU.

    There PyTorch gives the gradient of a window of -inf to its first position, in channels_last on CUDA it does not.
    """
    leaf = x.detach().cpu().double().contiguous().requires_grad_()
    out = F.max_pool2d(leaf, 3, 2, 1)
    total = torch.stack([grad.detach().cpu().double() for grad in grads]).sum(0)
    (gradient,) = torch.autograd.grad(out, leaf, total, retain_graph=True)
    (sizes,) = torch.autograd.grad(out, leaf, sum(grad.detach().cpu().double().abs() for grad in grads))
    return tuple(one.detach().to(x.device) for one in (out, gradient, sizes))  # type: ignore[return-value]


def assert_right(runner: Runner, x: Tensor, out: Tensor, gradient: Tensor, *grads: Tensor) -> None:
    """The maxima to the bit, the gradient to the rounding of a sum in float32 and of its result.

    PyTorch's own sums in half precision may be rounded to that at each addition.
    """
    maxima, wanted, sizes = exact(x, *grads)
    ours = runner.backend == "triton"
    assert out.dtype == gradient.dtype == x.dtype and out.is_contiguous(memory_format=LAST)
    assert not ours or gradient.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(out.double(), maxima, rtol=0, atol=0, equal_nan=True)
    wide = torch.finfo(torch.promote_types(x.dtype, FLOAT) if ours else x.dtype).eps
    allowed = torch.finfo(x.dtype).eps * wanted.abs() + 8 * wide * sizes
    if x.dtype == HALF:
        allowed += 2.0**-25  # subnormal
    wrong = (gradient.double() - wanted).abs() > allowed
    assert not wrong.any()


def results(x: Tensor, grad: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """The maxima and the gradient of x."""
    leaf = x.detach().requires_grad_()
    out = max_pool(leaf, backend=backend, **options)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def check(runner: Runner, shape: tuple[int, ...], kind: str, **options: Any) -> None:
    x = KINDS[kind](runner, shape)
    size = shape[0], shape[1], ops.pooled(shape[2]), ops.pooled(shape[3])
    grad = randn(runner, *size, seed=1).contiguous(memory_format=LAST)
    with poisoned_memory():
        out, gradient = results(x, grad, runner.backend, **options)
    assert out.shape == size and gradient.shape == shape
    if runner.backend == "reference" and runner.device == "cuda" and kind in ("mostly -inf", "all"):
        return  # see `exact`
    assert_right(runner, x, out, gradient, grad)


@everywhere
@kinds
def test_against_pytorch(runner: Runner, kind: str) -> None:
    for shape in SMALL + (LARGE if runner.device == "cuda" else []):
        check(runner, shape, kind)


@on_triton
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_tile(runner: Runner, config: MaxPoolConfig) -> None:
    for kind in ("normal", "all"):
        check(runner, (3, 40, 9, 7), kind, config=config)


@on_triton
def test_offsets_of_64_bits_and_grids_of_three_axes(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmetro_kernels.max_pool import triton

    monkeypatch.setattr(triton, "_INT32_NUMBERS", 0)
    monkeypatch.setattr(triton, "_MOST_PROGRAMS", 2)
    for kind in ("normal", "all"):
        check(runner, (2, 70, 9, 11), kind)


@on_cuda
def test_more_numbers_than_32_bits_count(runner: Runner) -> None:
    """The last rows of an image of 2.3 billion."""
    if runner.dtype != HALF or torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("one dtype is enough, and it takes 20 GB")
    x = torch.empty(1, 64, 6001, 6001, dtype=HALF, device="cuda", memory_format=LAST).normal_()
    grad = torch.empty(1, 64, 3001, 3001, dtype=HALF, device="cuda", memory_format=LAST).normal_()
    out, gradient = results(x, grad, "triton")
    rows = x[:, :, -9:, -501:]  # begins where a window of the whole image has its middle
    expected = F.max_pool2d(rows.double().contiguous(), 3, 2, 1)
    assert torch.equal(out[:, :, -4:, -200:].double(), expected[:, :, -4:, -200:])
    again, part = results(rows.contiguous(memory_format=LAST), grad[:, :, -5:, -251:], "triton")
    assert torch.equal(gradient[:, :, -6:, -400:], part[:, :, -6:, -400:]) and again.shape[2:] == (5, 251)


@on_each_backend
def test_other_memory_formats_and_strides(runner: Runner) -> None:
    x, grad = randn(runner, 2, 6, 7, 5), randn(runner, 2, 6, 4, 3, seed=1)
    expected = results(x.contiguous(memory_format=LAST), grad.contiguous(memory_format=LAST), runner.backend)
    spread = torch.stack([grad, grad], -1)[..., 1]
    for image in (x, surrounded(x), surrounded(x.contiguous(memory_format=LAST)), x.transpose(2, 3).contiguous().mT):
        for other in (grad, spread, grad.float() if runner.device == "cpu" else grad):
            for one, same in zip(results(image, other, runner.backend), expected, strict=True):
                assert torch.equal(one, same)
    constant = results(x, torch.ones((), dtype=x.dtype, device=x.device).expand_as(grad), runner.backend)
    assert torch.equal(constant[1], results(x, torch.ones_like(grad), runner.backend)[1])


@on_each_backend
def test_reading_stays_inside(runner: Runner) -> None:
    """Not a number from around the image, whose borders are NaN here, comes into it."""
    x = surrounded(randn(runner, 1, 64, 6, 7)).contiguous(memory_format=LAST)[:, 1:-1, 1:-1, 1:-1]
    assert bool(max_pool(x, backend=runner.backend).isfinite().all())


@everywhere
def test_two_takers(runner: Runner) -> None:
    """Their gradients are added in float32, before they are shared out; one may be missing."""
    x = randn(runner, 2, 70, 7, 6).contiguous(memory_format=LAST)
    one_grad, other_grad = (randn(runner, 2, 70, 4, 3, seed=seed).contiguous(memory_format=LAST) for seed in (1, 2))
    leaf = x.detach().requires_grad_()
    one, other = max_pool_twice(leaf, backend=runner.backend)
    assert torch.equal(one, other) and one.data_ptr() == other.data_ptr()
    with poisoned_memory():
        (both,) = torch.autograd.grad((one, other), leaf, (one_grad, other_grad), retain_graph=True)
        (first,) = torch.autograd.grad(one, leaf, one_grad, retain_graph=True)
        (second,) = torch.autograd.grad(other, leaf, other_grad)
    if runner.backend == "triton":
        assert_right(runner, x, one.detach(), both, one_grad, other_grad)
    torch.testing.assert_close(both, first + second, rtol=0.02, atol=0.02 if x.dtype.itemsize == 2 else 1e-6)
    for gradient, grad in ((first, one_grad), (second, other_grad)):
        assert torch.equal(gradient, results(x, grad, runner.backend)[1])


@on_each_backend
def test_only_where_it_is_asked_for(runner: Runner) -> None:
    x = randn(runner, 1, 3, 4, 4)
    assert not max_pool(x, backend=runner.backend).requires_grad
    with torch.no_grad():
        assert not max_pool(x.requires_grad_(), backend=runner.backend).requires_grad


@on_cuda
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    x = drawn(runner, (32, 64, 112, 112), *range(9))
    grad = randn(runner, 32, 64, 56, 56).contiguous(memory_format=LAST)
    first = results(x, grad, "triton")
    for _ in range(5):
        assert all(torch.equal(one, same) for one, same in zip(results(x, grad, "triton"), first, strict=True))


@on_triton
def test_opcheck(runner: Runner) -> None:
    x, grad = (randn(runner, 2, 6, size, size).contiguous(memory_format=LAST) for size in (7, 4))
    _, places = ops.max_pool_triton(x, ())
    for config in ((), (1, 2)):
        torch.library.opcheck(ops.max_pool_triton, (x, config))
        for more in (None, grad + 1):
            torch.library.opcheck(ops.max_pool_backward_triton, (grad, more, places, 7, 7, config))


@on_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(runner: Runner, dynamic: bool) -> None:
    def both(x: Tensor) -> Tensor:
        one, other = max_pool_twice(x * 2, backend="triton")
        return one + other.relu() + max_pool(x, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (6, 9):
        x = randn(runner, 2, 6, size, 5).contiguous(memory_format=LAST).requires_grad_()
        expected, got = both(x), compiled(x)
        assert torch.equal(got, expected)
        grads = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (got, expected)]
        torch.testing.assert_close(*grads)


@on_cuda
def test_in_a_graph(runner: Runner) -> None:
    x = randn(runner, 8, 64, 28, 28).contiguous(memory_format=LAST)
    grad = randn(runner, 8, 64, 14, 14).contiguous(memory_format=LAST)
    for _ in range(2):
        results(x, grad, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(x, grad, "triton")
    x.copy_(x.flip(0).clone())
    graph.replay()
    assert all(torch.equal(one, same) for one, same in zip(captured, results(x, grad, "triton"), strict=True))


@pytest.mark.parametrize("windows", [(1, 1, 1), (32, 56, 56), (3, 7, 5), (1, 3001, 3001)])
@pytest.mark.parametrize("channels", [1, 64, 65, 5_000_000])
def test_plans_cover_all_windows_once(windows: tuple[int, int, int], channels: int) -> None:
    batch, height, width = windows
    for config in CONFIGS:
        for itemsize in (2, 4):
            found = plan(batch, height, width, channels, itemsize, config)
            assert found.channels * itemsize == 128 and found.positions * 8 == 32 * config.warps
            assert (found.blocks - 1) * found.channels < channels <= found.blocks * found.channels
            assert (found.tiles - 1) * found.positions < found.strips <= found.tiles * found.positions
            assert batch * height * width <= found.strips * config.rows < batch * (height + config.rows) * width


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), (90, "fp32"), (80, "fp16")])
def test_kernels_compile_for_wide_reads(capability: int, dtype: str) -> None:
    """16 bytes a lane, each read once by a lane, nothing spilled, and enough warps with six reads each under way."""
    found = compile_report("compile_max_pool.py", capability, dtype)
    assert len(found) == 12
    bytes_of_places = 8 if dtype != "fp32" else 4
    for name, used in found.items():
        kernel, rows, *anything = name.split()
        many = int(rows)
        assert used["stack"] == 0 and used["waits"] == (capability >= 90), (name, used)
        if anything:
            continue
        assert used["registers"] <= 128 and used["shared"] <= 32, (name, used)
        if kernel == "forward":  # nine more reads are those for places of NaN
            assert used["ld 16"] == 3 * (2 * many + 1) + 9, (name, used)
            assert used["st 16"] == many and used[f"st {bytes_of_places}"] == many, (name, used)
        else:
            windows = 2 * (many + 1)
            assert used["ld 16"] == windows * (1 + (kernel == "backward_two")), (name, used)
            assert used[f"ld {bytes_of_places}"] == windows and used["st 16"] == 4 * many, (name, used)


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0],), {}, ValueError, r"x must be \[B, C, H, W\], got \[3, 4, 5\]"),
        ((X[:, :0],), {}, ValueError, r"x must have channels, rows and columns, got \[2, 0, 4, 5\]"),
        ((X[:, :, :, :0],), {}, ValueError, "x must have channels, rows and columns"),
        ((X.int(),), {}, TypeError, "x must be one of float32, float16, bfloat16, float64, got torch.int32"),
        ((X.to_sparse(),), {}, TypeError, "x must be a dense tensor"),
        ((None,), {}, TypeError, "x must be a tensor, got NoneType"),
        ((X,), {"config": (2, 4)}, TypeError, "config must be a MaxPoolConfig, got tuple"),
        ((X,), {"config": MaxPoolConfig(3, 4)}, ValueError, "rows must be one of 1, 2, 4, got 3"),
        ((X,), {"config": MaxPoolConfig(2, 3)}, ValueError, "warps must be one of 1, 2, 4, 8, 16, got 3"),
        ((X,), {"backend": "cudnn"}, ValueError, "backend='cudnn' is not known"),
        ((X.double(),), {"backend": "triton"}, BackendUnavailable, "float64"),
    ],
)
def test_refused(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    for pool in (max_pool, max_pool_twice):
        with pytest.raises(error, match=message):
            pool(*arguments, **options)


@on_triton
def test_the_ops_refuse_what_does_not_fit(runner: Runner) -> None:
    x, grad = (randn(runner, 2, 6, size, size).contiguous(memory_format=LAST) for size in (7, 4))
    places = torch.zeros_like(grad, dtype=torch.uint8)
    for arguments, message in (
        ((x.contiguous(), ()), "x must be contiguous in channels_last"),
        ((x, (1,)), "two numbers"),
        ((grad, None, places.int(), 7, 7, ()), "places must be torch.uint8"),
        ((grad, grad[:1], places, 7, 7, ()), "more must be"),
        ((grad, None, places, 9, 7, ()), "grad must have 5 rows, got 4"),
        ((grad, None, places, 7, 6, ()), "grad must have 3 columns, got 4"),
    ):
        op = ops.max_pool_triton if len(arguments) == 2 else ops.max_pool_backward_triton
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
