"""decoder_tail against float64 on every backend, device and dtype; what it refuses, and how it is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_tail_cases import Inputs, exact_and_plain, inputs
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
from fastmetro_kernels.fused import TailConfig, TailWeights, decoder_tail, fused_linear
from fastmetro_kernels.fused.decoder_tail import ops
from fastmetro_kernels.fused.decoder_tail.configs import TILES, pinned, problem


def run(runner: Runner, x: Inputs, **options: Any) -> Tensor:
    return decoder_tail(*x, feed_forward_epsilon=1e-3, backend=runner.backend, **options)


def check(runner: Runner, x: Inputs, **options: Any) -> Tensor:
    """The result, held against float64."""
    with poisoned_memory():
        got = run(runner, x, **options)
    assert got.dtype == x[0].dtype
    wide, narrow = exact_and_plain(x, options.get("scale"))
    # Four products in a row, each of rounded operands: as plain PyTorch, and a rounding of what is stored.
    stored = wide.abs()
    if runner.backend == "triton":  # the stream, too, while heads attend
        tokens, attended, weight, bias = (one.to(DOUBLE) for one in (*x[:2], *x[4][:2]))
        stored = stored + (tokens + F.linear(attended, weight, bias)).abs()
    single = torch.finfo(DOUBLE if runner.dtype == DOUBLE else FLOAT).eps
    rounding = torch.finfo(runner.dtype).eps / 2 * stored + 64 * single * (1 + wide.abs())
    assert_within_budget(got, wide, narrow, rounding)
    return got


# batch, tokens, keys, heads, dim, hidden
SMALL = [
    (1, 35, 49, 8, 16, 512), (2, 5, 128, 3, 13, 40), (3, 1, 1, 1, 1, 1), (1, 17, 7, 2, 64, 100),
    (0, 50, 50, 8, 16, 64), (2, 0, 49, 8, 16, 64),
]  # fmt: skip
LARGE = [(1, 445, 49, 8, 16, 512), (32, 445, 49, 8, 16, 512), (256, 445, 49, 8, 16, 512)]


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_against_float64(runner: Runner, sizes: tuple[int, int, int, int, int, int]) -> None:
    if sizes in LARGE and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    check(runner, inputs(runner, *sizes))


@on_each_backend
def test_random_sizes(runner: Runner) -> None:
    @settings(max_examples=6 if runner.interpreted else 40)
    @given(
        sizes=st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 128), st.integers(1, 3)),
        dim=st.integers(1, 42),
        hidden=st.integers(1, 100),
        scale=st.sampled_from([None, 0.0, -0.5]),
    )
    def search(sizes: tuple[int, int, int, int], dim: int, hidden: int, scale: float | None) -> None:
        check(runner, inputs(runner, *sizes, dim, hidden), scale=scale)

    search()


@pytest.mark.parametrize("tile", sorted({*TILES[2], *TILES[4]}), ids=lambda tile: "x".join(map(str, tile)))
@on_triton
def test_every_tile(runner: Runner, tile: TailConfig) -> None:
    """More than one program, the last incomplete; under load on a GPU, where a race would show."""
    if runner.dtype == FLOAT and not runner.interpreted and tile not in TILES[4]:
        pytest.skip("a tile for half precision")
    sizes = (1, tile.rows + 1, 49, 2, 16, tile.hidden + 8) if runner.interpreted else (64, 445, 49, 8, 16, 512)
    for _ in range(1 if runner.interpreted else 3):
        check(runner, inputs(runner, *sizes), config=tile)


@on_each_backend
def test_any_strides(runner: Runner) -> None:
    tokens, attended, k, v, weights = inputs(runner, 3, 9, 11, 2, 16, 24)
    check(runner, (tokens[:1].expand(3, -1, -1), attended, k, v, weights))
    check(runner, (surrounded(tokens), surrounded(attended), surrounded(k), surrounded(v), weights))
    turned = attended.transpose(0, 1).contiguous().transpose(0, 1)
    spread = randn(runner, 3, 9, 64)[..., ::2]
    mixed = v.transpose(1, 3).contiguous().transpose(1, 3)
    check(runner, (spread, turned, k[:1].expand(3, -1, -1, -1), mixed, weights))


@on_each_backend
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    x = inputs(runner, 2, 20, 49, 2, 16, 40)
    first = run(runner, x)
    for constant in (False, True):
        assert torch.equal(first, run(runner, x, constant_weights=constant))


@on_each_backend
def test_nan_stays_in_its_row(runner: Runner) -> None:
    x = inputs(runner, 1, 20, 9, 2, 16, 40)
    x[0][0, 3, 5] = torch.nan
    out = run(runner, x)
    assert bool(out[0, 3].isnan().all()) and not bool(out[0, [0, 2, 4, 19]].isnan().any())


@on_triton
def test_opcheck(runner: Runner) -> None:
    tokens, attended, k, v, weights = inputs(runner, 2, 5, 9, 2, 16, 24)
    rest = (0.25, 1e-5, 1e-5)
    torch.library.opcheck(ops.decoder_tail_triton, (tokens, attended, k, v, [*weights], *rest, False, ()))
    shared = tokens[:1].expand(2, -1, -1)
    torch.library.opcheck(ops.decoder_tail_triton, (shared, attended, k, v, [*weights], *rest, True, (16, 16, 4, 1)))
    for arguments, message in (
        ((tokens[0], attended, k, v, [*weights]), "tokens must be"),
        ((tokens, attended[:1], k, v, [*weights]), "attended must be"),
        ((tokens, attended, k[:, :, :1], v, [*weights]), "k must be"),
        ((tokens, attended, k, v[:, 1:], [*weights]), "v must be"),
        ((tokens, attended, k, v, [*weights][:9]), "ten tensors"),
        ((tokens, attended, k, v, [*weights[:8], weights.contract_weight.T, weights.contract_bias]), "contract_weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.decoder_tail_triton(*arguments, *rest, False, ())
    with pytest.raises(RuntimeError, match="rows must be one of"):
        ops.decoder_tail_triton(tokens, attended, k, v, [*weights], *rest, False, (8, 16, 4, 1))


@on_triton
def test_compiles_without_graph_breaks(runner: Runner) -> None:
    torch._dynamo.reset()

    def block(tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: TailWeights) -> Tensor:
        return 2 * decoder_tail(tokens + 1, attended, k, v, weights, backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = inputs(runner, 2, 5, 9, 2, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*x), block(*x), rtol=0, atol=0)


@on_cuda
def test_captured_in_a_cuda_graph_between_linear_layers(runner: Runner) -> None:
    """A chain of early launches: new numbers, new results, as with a wait after every kernel."""
    tokens, attended, _, _, weights = inputs(runner, 2, 445, 49, 8, 16, 512)
    image, reader = randn(runner, 2, 49, 128), randn(runner, 256, 128) / 11
    projection = randn(runner, 128, 128) / 11

    def block(wait: bool) -> Tensor:
        def pause() -> None:
            if wait:
                torch.cuda.synchronize()

        x = tokens
        for _ in range(3):
            k, v = fused_linear(image, reader, backend="triton").unflatten(2, (2, 8, 16)).unbind(2)
            pause()
            mixed = fused_linear(attended, projection, constant_weights=True, backend="triton")
            pause()
            x = decoder_tail(x, mixed, k, v, weights, constant_weights=True, backend="triton")
            pause()
        return x

    block(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(wait=False)
    for seed in range(3):
        attended.copy_(randn(runner, 2, 445, 128, seed=seed))
        graph.replay()
        assert torch.equal(out, block(wait=True))


def _zeros() -> Inputs:
    width, hidden = 32, 24
    weights = [torch.zeros(width, width), torch.zeros(width)] * 3
    weights += [torch.zeros(hidden, width), torch.zeros(hidden), torch.zeros(width, hidden), torch.zeros(width)]
    k = torch.zeros(2, 9, 2, 16)
    return torch.zeros(2, 5, width), torch.zeros(2, 5, width), k, k, TailWeights(*weights)


T, A, K, V, W = _zeros()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((T.numpy(), A, K, V, W), {}, TypeError, "tokens must be a tensor, got ndarray"),
        ((T, A.half(), K, V, W), {}, TypeError, "attended must be one of float32, got torch.float16"),
        ((T, A, K, V, [*W]), {}, TypeError, "weights must be TailWeights, got list"),
        ((T[0], A, K, V, W), {}, ValueError, r"tokens must be \[B, L, C\] with C from 1 to 128, got \[5, 32\]"),
        ((T, A[:, 1:], K, V, W), {}, ValueError, r"attended must be \[2, 5, 32\] like tokens, got \[2, 4, 32\]"),
        ((T, A, K[:, :, :1], V, W), {}, ValueError, r"k must be \[2, S, H, D\] with H D = 32 and S from 1 to 128, got"),
        ((T, A, K[:, :0], V, W), {}, ValueError, "S from 1 to 128"),
        ((T, A, K, V[:, 1:], W), {}, ValueError, r"v must be \[2, 9, 2, 16\] like k, got \[2, 8, 2, 16\]"),
        ((T, A, K, V, W._replace(query_bias=T[0, 0, :3])), {}, ValueError, r"query_bias must be \[32\], contiguous"),
        ((T, A, K, V, W._replace(contract_weight=W.expand_weight.T)), {}, ValueError, "contract_weight must be"),
        ((T, A, K, V, W), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ((T, A, K, V, W), {"cross_epsilon": -1.0}, ValueError, "cross_epsilon must be finite and at least 0, got -1.0"),
        ((T, A, K, V, W), {"feed_forward_epsilon": None}, TypeError, "feed_forward_epsilon must be a number, got None"),
        ((T, A, K, V, W), {"config": (16, 16, 4, 1)}, TypeError, "config must be a TailConfig, got tuple"),
        ((T, A, K, V, W), {"config": TailConfig(16, 16, 3, 1)}, ValueError, "warps must be one of 1, 2, 4, 8, got 3"),
        ((T, A, K, V, W), {"backend": "flash"}, ValueError, "backend='flash' is not known"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decoder_tail(*arguments, **options)


def test_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"for inference.*tokens requires grad"):
        decoder_tail(T.clone().requires_grad_(), A, K, V, W)


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT])
def test_backends_say_why_not(dtype: torch.dtype) -> None:
    given_inputs = (*(x.to(dtype) for x in (T, A, K, V)), TailWeights(*(x.to(dtype) for x in W)))
    with pytest.raises(BackendUnavailable, match=r"float64|bfloat16|CPU tensors only in the interpreter"):
        decoder_tail(*given_inputs, backend="triton")


def test_pinned_tiles() -> None:
    for element_size, tiles in TILES.items():
        assert pinned(element_size) == tiles[0] and len(set(tiles)) == len(tiles)
        assert [problem(tile) for tile in tiles] == [None] * len(tiles)
