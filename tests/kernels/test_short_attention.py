"""short_attention against float64 on every backend, device and dtype; what it refuses, and how it is launched."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused import ShortAttentionConfig, fused_linear, short_attention
from fastmetro_kernels.fused.short_attention import ops
from fastmetro_kernels.fused.short_attention.configs import TILES, pinned, problem


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention` in the dtype of q; its fast GPU kernels read beside short rows, perhaps NaN."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def check(runner: Runner, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **options: Any) -> Tensor:
    """The result, held against float64."""
    with poisoned_memory():
        got = short_attention(q, k, v, scale=scale, backend=runner.backend, **options)
    assert got.dtype == q.dtype
    if got.numel() == 0:
        assert got.shape == q.shape
        return got
    exact = plain(q.double(), k.double(), v.double(), scale)
    # A weighted mean of v: one rounding of the result, one of the weights, and float32 on the way.
    mean = plain(q.double(), k.double(), v.double().abs(), scale)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = abs(factor) * torch.einsum("blhd,bshd->blhs", q.double().abs(), k.double().abs()).amax(-1, keepdim=True)
    wide = torch.finfo(DOUBLE if q.dtype == DOUBLE else FLOAT).eps
    rounding = torch.finfo(q.dtype).eps / 2 * (exact.abs() + mean) + wide * (4 + scores) * mean
    aligned = (x.contiguous() for x in (q, k, v))  # on a GPU, kernels of PyTorch refuse rows that are not
    assert_within_budget(got, exact, plain(*aligned, scale), rounding)
    return got


def inputs(runner: Runner, batch: int, queries: int, keys: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v as slices of one wide projection."""
    k, v = randn(runner, batch, keys, 2, heads, dim, seed=1).unbind(2)
    return randn(runner, batch, queries, heads, dim), k, v


# batch, queries, keys, heads, dim
SMALL = [
    (1, 50, 50, 2, 16), (1, 33, 49, 1, 64), (2, 5, 128, 2, 40), (3, 1, 1, 2, 1), (1, 17, 7, 3, 128),
    (0, 50, 50, 8, 16), (2, 0, 49, 8, 64), (1, 4, 4, 0, 16),
]  # fmt: skip
LARGE = [(1, 50, 50, 8, 64), (1, 445, 49, 8, 64), (32, 445, 49, 8, 16), (32, 50, 50, 8, 64), (256, 445, 49, 8, 64)]


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_against_float64(runner: Runner, sizes: tuple[int, int, int, int, int]) -> None:
    if sizes in LARGE and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    check(runner, *inputs(runner, *sizes))


@on_each_backend
def test_random_sizes(runner: Runner) -> None:
    @settings(max_examples=8 if runner.interpreted else 40)
    @given(
        sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 128), st.integers(1, 3)),
        dim=st.integers(1, 128),
        scale=st.sampled_from([None, 0.0, -0.5, 2.0]),
    )
    def search(sizes: tuple[int, int, int, int], dim: int, scale: float | None) -> None:
        check(runner, *inputs(runner, *sizes, dim), scale=scale)

    search()


@pytest.mark.parametrize("tile", sorted({*TILES[2], *TILES[4]}), ids=str)
@on_triton
def test_every_tile(runner: Runner, tile: ShortAttentionConfig) -> None:
    """More than one program per head, the last incomplete."""
    check(runner, *inputs(runner, 1, tile.rows + 1, 49, 2, 16), config=tile)


@on_each_backend
def test_any_strides(runner: Runner) -> None:
    q, k, v = inputs(runner, 3, 9, 11, 2, 16)
    check(runner, q[:1].expand(3, -1, -1, -1), k, v)
    check(runner, surrounded(q)[:, 1:], k[:1].expand(3, -1, -1, -1), surrounded(v))
    check(runner, randn(runner, 3, 2, 9, 16).transpose(1, 2), k, randn(runner, 3, 16, 2, 11).permute(0, 3, 2, 1))


@on_each_backend
def test_only_its_own_memory_is_read(runner: Runner) -> None:
    """Everything lies among NaN, with sizes that no tile divides."""
    q, k, v = (surrounded(x) for x in inputs(runner, 2, 19, 37, 2, 13))
    assert bool(short_attention(q, k, v, backend=runner.backend).isfinite().all())


@on_each_backend
def test_large_scores_do_not_overflow(runner: Runner) -> None:
    q, k, v = inputs(runner, 1, 5, 49, 2, 16)
    check(runner, q * 100, k * 10, v)


@on_each_backend
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    q, k, v = inputs(runner, 2, 20, 49, 2, 16)
    first = short_attention(q, k, v, backend=runner.backend)
    assert torch.equal(first, short_attention(q, k, v, backend=runner.backend))


@on_triton
def test_opcheck(runner: Runner) -> None:
    q, k, v = inputs(runner, 2, 5, 9, 2, 16)
    torch.library.opcheck(ops.short_attention_triton, (q, k, v, 0.25, ()))
    torch.library.opcheck(ops.short_attention_triton, (q[:1].expand(2, -1, -1, -1), k, v, 0.25, (32, 4)))
    for arguments, message in (
        ((q[0], k, v), "q must be"),
        ((q, k[:, :, :1], v), "k must be"),
        ((q, k, v[:, 1:]), "v must be"),
        ((q, k[:, :0], v[:, :0]), "1 to 128 tokens"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.short_attention_triton(*arguments, 0.25, ())
    with pytest.raises(RuntimeError, match="rows must be one of 16, 32, 64, 128, got 8"):
        ops.short_attention_triton(q, k, v, 0.25, (8, 4))


@pytest.mark.parametrize("dynamic", [False, True])
@on_triton
def test_compiles_without_graph_breaks(runner: Runner, dynamic: bool) -> None:
    torch._dynamo.reset()

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * short_attention(q + 1, k, v, backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        given_inputs = inputs(runner, batch, 5, 9, 2, 16)
        torch.testing.assert_close(compiled(*given_inputs), block(*given_inputs), rtol=0, atol=0)


@on_each_backend
def test_gradients_are_refused(runner: Runner) -> None:
    q, k, v = inputs(runner, 2, 5, 9, 2, 16)
    with pytest.raises(RuntimeError, match=r"for inference.*q requires grad"):
        short_attention(q.requires_grad_(), k, v, backend=runner.backend)
    with torch.inference_mode():
        assert not short_attention(q, k, v, backend=runner.backend).requires_grad


Q, K = torch.zeros(2, 5, 2, 16), torch.zeros(2, 9, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q.numpy(), K, K), {}, TypeError, "q must be a tensor, got ndarray"),
        ((Q, K.half(), K), {}, TypeError, "k must be one of float32, got torch.float16"),
        ((Q, K, K.to("meta")), {}, ValueError, "v must be on cpu, got meta"),
        ((Q[0], K, K), {}, ValueError, r"q must be \[B, L, H, D\] with D from 1 to 128, got \[5, 2, 16\]"),
        ((Q[:1], K, K), {}, ValueError, r"k must be \[1, S, 2, 16\] for q of \[1, 5, 2, 16\], got \[2, 9, 2, 16\]"),
        ((Q, K[:, :0], K), {}, ValueError, "k must have 1 to 128 tokens, got 0"),
        ((Q, torch.zeros(2, 129, 2, 16), K), {}, ValueError, "k must have 1 to 128 tokens, got 129"),
        ((Q, K, K[:, 1:]), {}, ValueError, r"v must have the shape of k \[2, 9, 2, 16\], got \[2, 8, 2, 16\]"),
        ((Q, K, K), {"scale": "1"}, TypeError, "scale must be a float or None, got str"),
        ((Q, K, K), {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ((Q, K, K), {"config": (16, 2)}, TypeError, "config must be a ShortAttentionConfig, got tuple"),
        ((Q, K, K), {"config": ShortAttentionConfig(16, 3)}, ValueError, "warps must be one of 1, 2, 4, 8, got 3"),
        ((Q, K, K), {"backend": "flash"}, ValueError, "backend='flash' is not known"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        short_attention(*arguments, **options)


def test_backends_say_why_not() -> None:
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        short_attention(Q.double(), K.double(), K.double(), backend="triton")
    with pytest.raises(BackendUnavailable, match=r"bfloat16|CPU tensors only in the interpreter"):
        short_attention(*(x.to(BFLOAT) for x in (Q, K, K)), backend="triton")


@on_cuda
def test_captured_in_a_cuda_graph_behind_projections(runner: Runner) -> None:
    """A cross-attention of early launches: new numbers, new results, as with a wait after every kernel."""
    tokens, image = randn(runner, 1, 445, 512), randn(runner, 1, 49, 512)
    weights = [randn(runner, size, 512, seed=size) / 23 for size in (512, 1024)]
    output = randn(runner, 512, 512, seed=5) / 23

    def block(wait: bool) -> Tensor:
        q = fused_linear(tokens, weights[0], normalize=1e-5, backend="triton").unflatten(2, (8, 64))
        if wait:
            torch.cuda.synchronize()
        k, v = fused_linear(image, weights[1], backend="triton").unflatten(2, (2, 8, 64)).unbind(2)
        if wait:
            torch.cuda.synchronize()
        attended = short_attention(q, k, v, backend="triton").flatten(2)
        if wait:
            torch.cuda.synchronize()
        return fused_linear(attended, output, residual=tokens, constant_weights=True, backend="triton")

    block(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(wait=False)
    for seed in range(3):
        tokens.copy_(randn(runner, 1, 445, 512, seed=seed))
        graph.replay()
        assert torch.equal(out, block(wait=True))


@pytest.mark.parametrize("element_size", [2, 4])
def test_pinned_tiles_are_possible(element_size: int) -> None:
    for batch_heads in (1, 8, 256, 2048):
        for queries in (1, 50, 445):
            assert problem(pinned(batch_heads, queries, element_size)) is None


def test_few_queries_get_small_tiles_and_many_large_ones() -> None:
    assert pinned(8, 50, 2).rows == pinned(8, 445, 2).rows == pinned(8, 50, 4).rows == 16
    assert pinned(256, 445, 2).rows == pinned(2048, 50, 2).rows == 64
    assert pinned(2048, 445, 2).rows == 128
