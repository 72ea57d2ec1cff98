"""cross_attention_block against float64 on every backend, device and dtype; what it refuses, and how it is launched."""

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
from fastmetro_kernels.fused import BlockConfig, cross_attention_block, fused_linear
from fastmetro_kernels.fused.cross_attention_block import ops
from fastmetro_kernels.fused.cross_attention_block.configs import TILES, pinned, problem

Inputs = dict[str, Tensor]


def plain(x: Inputs) -> Tensor:
    """`scaled_dot_product_attention` and `F.linear` in the dtype of the inputs."""
    heads_first = (x[name].transpose(1, 2) for name in "qkv")
    attended = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)
    y = F.linear(attended, x["weight"], x.get("bias"))
    return y + x["residual"] if "residual" in x else y


def run(x: Inputs, **options: Any) -> Tensor:
    return cross_attention_block(
        x["q"], x["k"], x["v"], x["weight"], x.get("bias"), residual=x.get("residual"), **options
    )


def check(runner: Runner, x: Inputs, **options: Any) -> Tensor:
    """The result, held against float64."""
    with poisoned_memory():
        got = run(x, backend=runner.backend, **options)
    assert got.dtype == x["q"].dtype
    if got.numel() == 0:
        assert got.shape == (*x["q"].shape[:2], x["weight"].shape[0])
        return got
    wide = {name: tensor.double() for name, tensor in x.items()}
    exact = plain(wide)
    size = plain(wide | {name: wide[name].abs() for name in wide if name not in "qk"})
    # One rounding of the result; in front of the projection one of the weights and one of what attention gives.
    single, stored = torch.finfo(DOUBLE if runner.dtype == DOUBLE else FLOAT).eps, torch.finfo(runner.dtype).eps
    assert_within_budget(got, exact, plain(x), stored / 2 * exact.abs() + (stored + 8 * single) * size)
    return got


def inputs(
    runner: Runner,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    dim: int,
    features: int,
    rest: str = "bias residual",
) -> Inputs:
    """k and v are slices of one wide projection; `rest` names what is added: bias, residual."""
    k, v = randn(runner, batch, keys, 2, heads, dim, seed=1).unbind(2)
    weight = randn(runner, features, heads * dim, seed=2) * max(heads * dim, 1) ** -0.5
    found = {"q": randn(runner, batch, queries, heads, dim), "k": k, "v": v, "weight": weight}
    added = {"bias": (features,), "residual": (batch, queries, features)}
    return found | {name: randn(runner, *shape, seed=3) for name, shape in added.items() if name in rest}


# batch, queries, keys, heads, dim, features
SMALL = [
    (1, 35, 49, 8, 16, 128), (2, 5, 128, 3, 13, 21), (3, 1, 1, 1, 1, 1), (1, 17, 7, 2, 64, 100),
    (0, 50, 50, 8, 16, 128), (2, 0, 49, 8, 16, 128),
]  # fmt: skip
LARGE = [(1, 445, 49, 8, 16, 128), (32, 445, 49, 8, 16, 128), (256, 50, 50, 8, 16, 128)]


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_against_float64(runner: Runner, sizes: tuple[int, int, int, int, int, int]) -> None:
    if sizes in LARGE and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    check(runner, inputs(runner, *sizes))


@on_each_backend
def test_random_sizes(runner: Runner) -> None:
    @settings(max_examples=8 if runner.interpreted else 40)
    @given(
        sizes=st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 128), st.integers(1, 3)),
        dim=st.integers(1, 128),
        features=st.integers(1, 128),
        rest=st.sampled_from(["", "bias", "residual"]),
    )
    def search(sizes: tuple[int, int, int, int], dim: int, features: int, rest: str) -> None:
        check(runner, inputs(runner, *sizes, dim, features, rest))

    search()


@pytest.mark.parametrize("tile", sorted({*TILES[2], *TILES[4]}), ids=lambda tile: "x".join(map(str, tile)))
@on_triton
def test_every_tile(runner: Runner, tile: BlockConfig) -> None:
    check(runner, inputs(runner, 1, tile.rows + 1, 49, 2, 16, 128), config=tile)


@on_each_backend
def test_any_strides(runner: Runner) -> None:
    x = inputs(runner, 3, 9, 11, 2, 16, 24)
    check(runner, x | {"q": x["q"][:1].expand(3, -1, -1, -1), "residual": x["residual"][0]})
    check(runner, {name: surrounded(tensor) for name, tensor in x.items()})
    residual = x["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    check(runner, x | {"weight": x["weight"].T.contiguous().T, "residual": residual})
    assert bool(run({name: surrounded(tensor) for name, tensor in x.items()}, backend=runner.backend).isfinite().all())


@on_each_backend
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    x = inputs(runner, 2, 20, 49, 2, 16, 40)
    first = run(x, backend=runner.backend)
    for constant in (False, True):
        assert torch.equal(first, run(x, constant_weights=constant, backend=runner.backend))


@on_triton
def test_opcheck(runner: Runner) -> None:
    x = inputs(runner, 2, 5, 9, 2, 16, 24)
    qkv = x["q"], x["k"], x["v"]
    op = ops.cross_attention_block_triton
    torch.library.opcheck(op, (*qkv, x["weight"], x["bias"], x["residual"], 0.25, True, ()))
    torch.library.opcheck(op, (*qkv, x["weight"], None, None, 0.25, False, (32, 4, 2)))
    for arguments, message in (
        ((x["q"][0], *qkv[1:], x["weight"], None, None), "q must be"),
        ((*qkv, x["weight"][:, 1:], None, None), "weight must be"),
        ((*qkv, x["weight"], x["bias"][1:], None), "bias must be"),
        ((*qkv, x["weight"], None, x["residual"][:1]), "residual must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 0.25, False, ())


@on_triton
def test_compiles_without_graph_breaks(runner: Runner) -> None:
    torch._dynamo.reset()
    x = inputs(runner, 2, 5, 9, 2, 16, 24)

    def function(q: Tensor) -> Tensor:
        return 2 * run(x | {"q": q + 1}, backend=runner.backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x["q"]), function(x["q"]), rtol=0, atol=0)


@on_each_backend
def test_gradients_are_refused(runner: Runner) -> None:
    x = inputs(runner, 2, 5, 9, 2, 16, 24)
    x["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"for inference.*weight requires grad"):
        run(x, backend=runner.backend)
    with torch.no_grad():
        assert not run(x, backend=runner.backend).requires_grad


X = {"q": torch.zeros(2, 5, 2, 16), "k": torch.zeros(2, 9, 2, 16), "v": torch.zeros(2, 9, 2, 16)}
X["weight"] = torch.zeros(24, 32)


@pytest.mark.parametrize(
    ("changed", "options", "error", "message"),
    [
        ({"q": None}, {}, TypeError, "q must be a tensor, got NoneType"),
        ({"v": X["v"][:, 1:]}, {}, ValueError, "v must have the shape of k"),
        ({"weight": X["weight"].half()}, {}, TypeError, "weight must be one of float32, got torch.float16"),
        ({"weight": X["weight"].T}, {}, ValueError, r"weight must be \[N, 32\] with N from 1 to 128 for q of"),
        ({"weight": torch.zeros(129, 32)}, {}, ValueError, r"N from 1 to 128 for q of .*, got \[129, 32\]"),
        ({"bias": torch.zeros(5, 24)}, {}, ValueError, r"bias must be \[24\], got \[5, 24\]"),
        ({"residual": torch.zeros(2, 5, 23)}, {}, ValueError, r"residual must be \[2, 5, 24\] or \[5, 24\], got"),
        ({"residual": torch.zeros(5, 24).to("meta")}, {}, ValueError, "residual must be on cpu, got meta"),
        ({}, {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({}, {"config": (16, 4, 2)}, TypeError, "config must be a BlockConfig, got tuple"),
        ({}, {"config": BlockConfig(128, 4, 2)}, ValueError, "rows must be one of 16, 32, 64, got 128"),
        ({}, {"backend": "flash"}, ValueError, "backend='flash' is not known"),
    ],
)
def test_errors_name_the_argument(changed: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(X | changed, **options)


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT], ids=str)
def test_backends_say_why_not(dtype: torch.dtype) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"float64 is not supported|bfloat16|CPU tensors only in the interpreter"
    ):
        run({name: tensor.to(dtype) for name, tensor in X.items()}, backend="triton")


@on_cuda
def test_captured_in_a_cuda_graph_between_linear_layers(runner: Runner) -> None:
    """Early launches on both sides: new numbers, new results, as with a wait after every kernel."""
    x = inputs(runner, 1, 445, 49, 8, 16, 128)
    tokens, query = randn(runner, 1, 445, 128, seed=4), randn(runner, 128, 128, seed=5) / 11

    def layer(wait: bool) -> Tensor:
        y = tokens
        for _ in range(3):
            q = fused_linear(y, query, normalize=1e-5, constant_weights=True, backend="triton").unflatten(2, (8, 16))
            if wait:
                torch.cuda.synchronize()
            y = run(x | {"q": q, "residual": y}, constant_weights=True, backend="triton")
            if wait:
                torch.cuda.synchronize()
        return y

    layer(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(wait=False)
    for seed in range(3):
        tokens.copy_(randn(runner, 1, 445, 128, seed=seed))
        graph.replay()
        assert torch.equal(out, layer(wait=True))


@pytest.mark.parametrize("element_size", [2, 4])
def test_pinned_tiles(element_size: int) -> None:
    tiles = [pinned(batch, queries, element_size) for batch in (1, 32, 256) for queries in (1, 50, 445)]
    assert all(problem(tile) is None for tile in tiles)
    assert pinned(1, 445, element_size).rows == 16 and tiles[-1].rows == TILES[element_size][0].rows
