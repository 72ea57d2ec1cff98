"""to_channels_last against PyTorch's own copy, bit by bit, on every backend, device and dtype, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import DOUBLE, FLOAT, Runner, everywhere, on_cuda, on_each_backend, on_triton, poisoned_memory, randn
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused import to_channels_last
from fastmetro_kernels.fused.channels_last import ops

SMALL = [(1, 3, 5, 7), (2, 1, 4, 4), (3, 16, 9, 11), (1, 3, 30, 40), (0, 3, 4, 4), (2, 3, 0, 4)]
LARGE = [(1, 3, 224, 224), (32, 3, 224, 224), (2, 3, 225, 223)]


def check(runner: Runner, x: Tensor, dtype: torch.dtype) -> None:
    with poisoned_memory():
        got = to_channels_last(x, dtype, backend=runner.backend)
    assert got.dtype == dtype and (got.numel() == 0 or got.is_contiguous(memory_format=torch.channels_last))
    assert torch.equal(got, x.to(dtype)) and (got.numel() == 0 or got.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_the_bits_of_a_copy(runner: Runner, sizes: tuple[int, ...]) -> None:
    if sizes in LARGE and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    x = randn(runner, *sizes)
    for dtype in {x.dtype, DOUBLE if x.dtype == DOUBLE else FLOAT}:
        check(runner, x, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_triton
def test_rounds_to_half_precision(runner: Runner, dtype: torch.dtype) -> None:
    if runner.device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    x = randn(runner, 2, 3, 9, 10).to(FLOAT)
    x[0, 1, 2, 3], x[1, 2, 0, 0] = torch.inf, 1e6
    check(runner, x, dtype)


@on_each_backend
def test_any_order(runner: Runner) -> None:
    x = randn(runner, 3, 4, 9, 10)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x[:, ::2],
        x.transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
    ):
        check(runner, other, x.dtype)


@on_each_backend
def test_not_a_number_stays_where_it_is(runner: Runner) -> None:
    x = randn(runner, 1, 3, 5, 5)
    x[0, 1, 2, 2] = torch.nan
    got = to_channels_last(x, x.dtype, backend=runner.backend)
    assert torch.equal(got.isnan(), x.isnan())


@on_triton
def test_opcheck(runner: Runner) -> None:
    x = randn(runner, 2, 3, 5, 4)
    torch.library.opcheck(ops.to_channels_last_triton, (x, FLOAT))
    for given, dtype, message in (
        (x[0], FLOAT, "x must be"),
        (x.transpose(2, 3), FLOAT, "x must be contiguous"),
        (x, DOUBLE, "does not take float64"),
        (x.new_zeros(1, 17, 2, 2), FLOAT, "1 to 16 channels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.to_channels_last_triton(given, dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@on_triton
def test_compiles_without_graph_breaks(runner: Runner, dynamic: bool) -> None:
    torch._dynamo.reset()

    def block(x: Tensor) -> Tensor:
        return 2 * to_channels_last(x + 1, FLOAT, backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = randn(runner, batch, 3, 5, 4)
        torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


@on_cuda
def test_captured_in_a_cuda_graph(runner: Runner) -> None:
    x = randn(runner, 4, 3, 224, 224)
    to_channels_last(x, FLOAT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = to_channels_last(to_channels_last(x * 2, FLOAT) + 1, x.dtype)
    for seed in range(3):
        x.copy_(randn(runner, 4, 3, 224, 224, seed=seed))
        graph.replay()
        assert torch.equal(y, ((x * 2).to(FLOAT) + 1).to(x.dtype))


X = torch.zeros(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.numpy(), FLOAT), {}, TypeError, "x must be a tensor, got ndarray"),
        ((X.int(), FLOAT), {}, TypeError, "x must be one of float32.*got torch.int32"),
        ((X, torch.int32), {}, TypeError, "dtype must be one of float32.*got torch.int32"),
        ((X[0], FLOAT), {}, ValueError, r"x must be \[B, C, H, W\]"),
        ((X[:, :0], FLOAT), {}, ValueError, "C of at least 1"),
        ((X, FLOAT), {"backend": "apex"}, ValueError, "backend='apex' is not known"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_channels_last(*arguments, **options)


def test_many_channels_run_on_the_reference() -> None:
    x = torch.randn(1, 20, 3, 4)
    assert torch.equal(to_channels_last(x, FLOAT), x)


def test_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"for inference.*x requires grad"):
        to_channels_last(X.clone().requires_grad_(), FLOAT)


@on_triton
def test_backends_say_why_not(runner: Runner) -> None:
    x = X.to(runner.device)
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        to_channels_last(x.double(), FLOAT, backend="triton")
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        to_channels_last(x, DOUBLE, backend="triton")
