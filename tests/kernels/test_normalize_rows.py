"""normalize_rows against float64 on every backend, device and dtype, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    Runner,
    assert_within_budget,
    everywhere,
    on_cuda,
    on_each_backend,
    on_triton,
    poisoned_memory,
    randn,
    surrounded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused import NormalizeConfig, normalize_rows
from fastmetro_kernels.fused.normalize import ops
from fastmetro_kernels.fused.normalize.configs import pinned, problem, tiles


def check(runner: Runner, x: Tensor, epsilon: float = 1e-5, shift: Tensor | None = None, **options: Any) -> Tensor:
    """The result, held against float64."""
    with poisoned_memory():
        got = normalize_rows(x, epsilon, shift=shift, backend=runner.backend, **options)
    assert got.dtype == x.dtype and got.shape == x.shape
    if got.numel() == 0:
        return got
    wide = x.to(DOUBLE) if shift is None else x.to(DOUBLE) + shift.to(DOUBLE)
    exact = F.layer_norm(wide, x.shape[-1:], eps=epsilon)
    single = torch.finfo(DOUBLE if x.dtype == DOUBLE else FLOAT).eps
    far = (wide.abs().amax(-1, keepdim=True) + 1) / (wide.var(-1, keepdim=True, correction=0) + epsilon).sqrt()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs() + 4 * single * (1 + far)
    plain = F.layer_norm(wide.to(x.dtype), x.shape[-1:], eps=epsilon)
    assert_within_budget(got, exact, plain, rounding)
    return got


SMALL = [(1, 50, 128), (2, 3, 512), (3, 7, 37), (1, 1, 1), (2, 5, 2048), (1, 2, 5000), (0, 5, 16), (2, 0, 16)]
LARGE = [(1, 445, 512), (32, 445, 512), (256, 445, 128), (256, 50, 512)]


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_against_float64(runner: Runner, sizes: tuple[int, int, int]) -> None:
    if sizes in LARGE and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    check(runner, 3 * randn(runner, *sizes) + 1)


@on_each_backend
def test_random_sizes(runner: Runner) -> None:
    @settings(max_examples=8 if runner.interpreted else 40)
    @given(
        sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 300)),
        epsilon=st.sampled_from([1e-5, 0.3]),
    )
    def search(sizes: tuple[int, int, int], epsilon: float) -> None:
        check(runner, randn(runner, *sizes), epsilon)

    search()


@pytest.mark.parametrize("width", [37, 128, 512, 5000])
@on_triton
def test_every_tile(runner: Runner, width: int) -> None:
    """More than one program, the last incomplete."""
    for tile in tiles(width):
        check(runner, randn(runner, 1, tile.rows + 1, width), config=tile)


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_shifted_rows(runner: Runner, sizes: tuple[int, int, int]) -> None:
    """Each feature's own number is added before the norm, not rounded to the dtype of x."""
    if sizes in LARGE and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    x = randn(runner, *sizes)
    shift = 3 * torch.randn(sizes[-1], dtype=DOUBLE if x.dtype == DOUBLE else FLOAT, device=x.device)
    check(runner, x, shift=shift)
    check(runner, x, shift=shift.repeat_interleave(2)[::2])


@everywhere
def test_marks_tell_a_row_its_place(runner: Runner) -> None:
    """So that a product adds a bias per token."""
    for sizes, marks in (((3, 7, 37), 7), ((2, 5, 64), 64), ((2, 3, 5, 16), 9), ((0, 5, 16), 8), ((2, 0, 16), 3)):
        x = randn(runner, *sizes)
        with poisoned_memory():
            got = normalize_rows(x, marks=marks, backend=runner.backend)
        assert got.shape == (*sizes[:-1], sizes[-1] + marks) and got.is_contiguous() and got.dtype == x.dtype
        # Compiled with marks, the kernel may add in another order; interpreted and by the reference it does not.
        bits = 2 if runner.backend == "triton" and not runner.interpreted else 0
        tolerance = {"rtol": bits * torch.finfo(x.dtype).eps, "atol": 2 * bits * torch.finfo(FLOAT).eps}
        torch.testing.assert_close(got[..., : sizes[-1]], normalize_rows(x, backend=runner.backend), **tolerance)
        places = torch.eye(sizes[-2], marks, dtype=x.dtype, device=x.device)
        assert torch.equal(got[..., sizes[-1] :], places.expand(*sizes[:-2], -1, -1))
    part = surrounded(randn(runner, 3, 9, 40))[:, 1:]
    bias = randn(runner, 8, 24)
    weight = torch.cat([randn(runner, 24, 40), bias.T], 1)
    got = normalize_rows(part, marks=8, backend=runner.backend) @ weight.T
    expected = normalize_rows(part, backend=runner.backend).double() @ weight[:, :40].T.double() + bias.double()
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.2 if runner.dtype.itemsize == 2 else 1e-3)


@on_each_backend
def test_any_strides(runner: Runner) -> None:
    x = randn(runner, 3, 9, 40)
    check(runner, surrounded(x)[:, 1:])
    check(runner, x[:1].expand(3, -1, -1))
    check(runner, x.transpose(0, 1))
    check(runner, x[..., ::2])
    check(runner, x[0])
    check(runner, x[None].expand(2, -1, -1, -1))
    assert bool(normalize_rows(surrounded(x), backend=runner.backend).isfinite().all())


@everywhere
def test_a_large_mean_is_taken_off(runner: Runner) -> None:
    check(runner, randn(runner, 2, 20, 300) + 100)


@on_each_backend
def test_nan_stays_in_its_row(runner: Runner) -> None:
    x = randn(runner, 1, 20, 40)
    x[0, 3, 5] = torch.nan
    out = normalize_rows(x, backend=runner.backend)
    assert bool(out[0, 3].isnan().all()) and not bool(out[0, [0, 2, 4, 19]].isnan().any())


@on_each_backend
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    x = randn(runner, 2, 33, 300)
    first = normalize_rows(x, backend=runner.backend)
    for _ in range(3):
        assert torch.equal(first, normalize_rows(x, backend=runner.backend))


@on_triton
def test_opcheck(runner: Runner) -> None:
    x = randn(runner, 2, 5, 20)
    torch.library.opcheck(ops.normalize_rows_triton, (x, None, 1e-5, 0, ()))
    torch.library.opcheck(ops.normalize_rows_triton, (x[:1].expand(3, -1, -1), None, 1e-5, 6, (4, 2)))
    torch.library.opcheck(ops.normalize_rows_triton, (x, torch.zeros(20, device=x.device), 1e-5, 0, ()))
    for given_x, shift, config, message in (
        (x[0], None, (), "x must be"),
        (x[..., :0], None, (), "1 to 16384 features"),
        (x, torch.zeros(3, device=x.device), (), r"shift must be float32 \[20\]"),
        (x, None, (3, 4), "rows must be one of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.normalize_rows_triton(given_x, shift, 1e-5, 0, config)


@pytest.mark.parametrize("dynamic", [False, True])
@on_triton
def test_compiles_without_graph_breaks(runner: Runner, dynamic: bool) -> None:
    torch._dynamo.reset()

    def block(x: Tensor) -> Tensor:
        return 2 * normalize_rows(x + 1, backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = randn(runner, batch, 5, 20)
        torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


@on_cuda
def test_captured_in_a_cuda_graph(runner: Runner) -> None:
    """A chain of early launches: new numbers, new results."""
    x = randn(runner, 4, 445, 512)
    normalize_rows(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(5):
            y = normalize_rows(y * 2 + 1)
    for seed in range(3):
        x.copy_(randn(runner, 4, 445, 512, seed=seed))
        graph.replay()
        expected = x
        for _ in range(5):
            expected = normalize_rows(expected * 2 + 1)
            torch.cuda.synchronize()
        assert torch.equal(y, expected)


X = torch.zeros(2, 5, 20)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.numpy(),), {}, TypeError, "x must be a tensor, got ndarray"),
        ((X.int(),), {}, TypeError, "x must be one of float32.*got torch.int32"),
        ((X[0, 0],), {}, ValueError, r"x must be \[..., M, K\]"),
        ((X,), {"shift": torch.zeros(5)}, ValueError, r"shift must be \[20\], got \[5\]"),
        ((X,), {"shift": torch.zeros(20).half()}, TypeError, "shift must be one of float32, got torch.float16"),
        ((X[..., :0],), {}, ValueError, "K of at least 1"),
        ((X,), {"marks": 4}, ValueError, "marks must be 0 or a whole number of at least 5, got 4"),
        ((X,), {"marks": True}, ValueError, "marks must be 0 or a whole number of at least 5, got True"),
        ((X, True), {}, TypeError, "epsilon must be a number, got True"),
        ((X, -1.0), {}, ValueError, "epsilon must be finite and at least 0, got -1.0"),
        ((X,), {"config": (1, 4)}, TypeError, "config must be a NormalizeConfig, got tuple"),
        ((X,), {"config": NormalizeConfig(3, 4)}, ValueError, "rows must be one of 1, 2"),
        ((X,), {"backend": "apex"}, ValueError, "backend='apex' is not known"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize_rows(*arguments, **options)


def test_rows_wider_than_registers_hold_run_on_the_reference() -> None:
    wide = torch.randn(1, 2, 20000)
    torch.testing.assert_close(normalize_rows(wide), F.layer_norm(wide, (20000,)))


def test_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"for inference.*x requires grad"):
        normalize_rows(X.clone().requires_grad_())


def test_backends_say_why_not() -> None:
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        normalize_rows(X.double(), backend="triton")
    with pytest.raises(BackendUnavailable, match=r"bfloat16|CPU tensors only in the interpreter"):
        normalize_rows(X.to(BFLOAT), backend="triton")


def test_pinned_tiles() -> None:
    for width in (1, 37, 128, 512, 2048, 16384):
        for rows in (1, 49, 445, 14240, 113920):
            assert problem(pinned(rows, width)) is None
    assert pinned(49, 512).rows == 2 and pinned(113920, 512).rows == 8
