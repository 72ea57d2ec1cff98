"""fused_linear against float64 on every backend, device and dtype; what it refuses, and how it is launched."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fused_cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    TRITON_RUNNERS,
    Runner,
    everywhere,
    on_cuda,
    on_each_backend,
    on_triton,
    randn,
    surrounded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import check, late, tensors
from torch import Tensor, nn

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused import LinearConfig, fused_linear
from fastmetro_kernels.fused.linear import configs, ops
from fastmetro_kernels.fused.linear.configs import MEASURED, NARROW, TILES, pinned, problem

# batch, tokens, K, N, normalize, bias, residual, relu. The layers of FastMETRO, and odd ones.
SMALL = [
    (1, 50, 128, 96, 1e-5, "token", None, False),
    (2, 49, 128, 48, None, "feature", "shared", False),
    (1, 17, 512, 48, 1e-5, "feature", None, True),
    (1, 33, 1000, 32, None, None, "sample", False),
    (3, 7, 37, 21, 1e-5, "token", "sample", True),
    (1, 1, 1, 1, 1e-5, "feature", "sample", False),
    (2, 1, 130, 17, 1e-2, None, "shared", True),
    (0, 49, 16, 16, 1e-5, "feature", "shared", True),
    (2, 0, 16, 16, None, "token", None, True),
    (2, 5, 16, 0, None, "feature", None, False),
]
LARGE = [
    (1, 50, 512, 1536, 1e-5, "token", None, False),
    (1, 445, 512, 512, None, "feature", "sample", False),
    (1, 445, 512, 2048, 1e-5, "feature", None, True),
    (1, 445, 2048, 512, None, "feature", "sample", False),
    (32, 445, 128, 384, 1e-5, "token", None, False),
    (32, 49, 512, 3072, None, "feature", None, False),
    (32, 445, 2048, 512, None, "feature", "shared", False),
]


@pytest.mark.parametrize("case", range(len(SMALL) + len(LARGE)))
@everywhere
def test_against_float64(runner: Runner, case: int) -> None:
    if case >= len(SMALL) and runner.device == "cpu":
        pytest.skip("sizes for a GPU")
    batch, tokens, width, features, normalize, bias, residual, relu = [*SMALL, *LARGE][case]
    x, weight, added, kept = tensors(runner, batch, tokens, width, features, bias, residual)
    check(runner, x, weight, added, normalize=normalize, residual=kept, relu=relu)


@on_each_backend
def test_random_sizes(runner: Runner) -> None:
    @settings(max_examples=8 if runner.interpreted else 40)
    @given(
        sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 150), st.integers(0, 50)),
        normalize=st.sampled_from([None, 1e-5, 0.3]),
        bias=st.sampled_from([None, "feature", "token"]),
        residual=st.sampled_from([None, "shared", "sample"]),
        relu=st.booleans(),
    )
    def search(
        sizes: tuple[int, int, int, int], normalize: float | None, bias: str | None, residual: str | None, relu: bool
    ) -> None:
        x, weight, added, kept = tensors(runner, *sizes, bias, residual)
        check(runner, x, weight, added, normalize=normalize, residual=kept, relu=relu)

    search()


IN_USE = tuple(tile for key, bands in MEASURED.items() if key[0] == 2 for _, tile in bands)
OF_HALF = tuple(dict.fromkeys((*TILES[2], *IN_USE)))
"""Of half precision: those to choose from, and those that layers get."""


@pytest.mark.parametrize("tile", [*OF_HALF, *TILES[4], *NARROW], ids=lambda tile: "x".join(map(str, tile)))
@on_triton
def test_every_tile(runner: Runner, tile: LinearConfig) -> None:
    """More than one program each way, the last tiles incomplete; a step that is all, and several of them."""
    if runner.dtype == FLOAT and not runner.interpreted and tile not in (*TILES[4], *NARROW):
        pytest.skip("a tile for half precision")
    step = tile.depth * tile.shares
    for width, normalize in ((100, 1e-5), (step + 8, None if runner.interpreted else 1e-5)):
        x, weight, bias, residual = tensors(runner, 1, tile.rows + 1, width, tile.columns + 3, "token", "sample")
        check(runner, x, weight, bias, normalize=normalize, residual=residual, config=tile)


@pytest.mark.parametrize("tile", OF_HALF, ids=lambda tile: "x".join(map(str, tile)))
@on_cuda
def test_every_tile_under_load(runner: Runner, tile: LinearConfig) -> None:
    """The layers of FastMETRO that keep all multiprocessors busy, where a race shows that small cases hide."""
    if runner.dtype == FLOAT:
        pytest.skip("tiles for half precision")
    for tokens, width, features in ((445, 512, 2048), (49, 512, 3072), (445, 128, 512), (445, 2048, 512)):
        x, weight, bias, _ = tensors(runner, 4, tokens, width, features, "feature", None)
        for _ in range(3):
            check(runner, x, weight, bias, normalize=1e-5, relu=True, config=tile)


@on_each_backend
def test_any_strides(runner: Runner) -> None:
    """Slices of tokens and features, shared samples, transposed and spread tensors, more axes and fewer."""
    x = randn(runner, 3, 9, 40)
    weight, bias = randn(runner, 24, 40, seed=1), randn(runner, 9, 24, seed=2)
    residual = randn(runner, 3, 9, 24, seed=3)
    options: dict[str, Any] = {"normalize": 1e-5, "relu": True}
    check(runner, surrounded(x)[:, 1:], surrounded(weight), bias[1:], residual=surrounded(residual)[:, 1:], **options)
    check(runner, x[:1].expand(3, -1, -1), weight, bias, residual=residual[:1].expand(3, -1, -1), **options)
    check(runner, x.transpose(0, 1), weight.T.contiguous().T, residual=residual.transpose(0, 1), **options)
    check(runner, randn(runner, 3, 9, 80)[..., ::2], weight, randn(runner, 24, 9).T, **options)
    check(runner, x[0], weight, bias, residual=residual[0], **options)
    check(runner, x[None].expand(2, -1, -1, -1), weight, residual=residual[0], **options)
    check(runner, x[:, None, :, :].expand(-1, 2, -1, -1), weight, bias, **options)


@on_each_backend
def test_only_its_own_memory_is_read(runner: Runner) -> None:
    """Everything lies among NaN, with sizes that no tile divides."""
    x, weight, bias, residual = tensors(runner, 2, 19, 37, 21, "token", "sample")
    assert bias is not None and residual is not None
    for config in (None, LinearConfig(16, 16, 16, 2, 4, 2)):
        out = fused_linear(
            surrounded(x), surrounded(weight), surrounded(bias), normalize=1e-5, residual=surrounded(residual),
            config=config, backend=runner.backend,
        )  # fmt: skip
        assert bool(out.isfinite().all())


@on_each_backend
def test_nan_stays_in_its_row(runner: Runner) -> None:
    x, weight, bias, _ = tensors(runner, 1, 20, 40, 24, "feature", None)
    x[0, 3, 5] = torch.nan
    out = fused_linear(x, weight, bias, normalize=1e-5, relu=True, backend=runner.backend)
    assert bool(out[0, 3].isnan().all()) and not bool(out[0, [0, 1, 2, 4, 19]].isnan().any())


@everywhere
def test_dtypes_of_what_is_added_and_of_the_result(runner: Runner) -> None:
    if runner.dtype == DOUBLE:
        return
    x, weight, bias, residual = tensors(runner, 2, 5, 40, 24, "feature", "sample")
    assert bias is not None and residual is not None
    check(runner, x, weight, bias.float(), residual=residual, relu=True)
    check(runner, x, weight, bias, residual=residual.float(), out_dtype=FLOAT)
    check(runner, x, weight, out_dtype=HALF)
    for normalize in (None, 1e-5):
        check(runner, x, weight.float(), bias, normalize=normalize, out_dtype=FLOAT)


@on_each_backend
def test_a_layer_norm_with_gain_and_shift_is_folded(runner: Runner) -> None:
    norm, linear = nn.LayerNorm(40, dtype=DOUBLE), nn.Linear(40, 24, dtype=DOUBLE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = randn(runner, 2, 7, 40)
    with torch.no_grad():
        exact = linear(norm(x.cpu().double()))
        weight, bias = linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias
        out = fused_linear(x, weight.to(x), bias.to(x), normalize=norm.eps, backend=runner.backend)
        plain = linear.to(x)(norm.to(x)(x))
    assert bool(((out.cpu() - exact).abs().amax() <= 4 * (plain.cpu() - exact).abs().amax()).all())


@on_each_backend
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    x, weight, bias, residual = tensors(runner, 2, 33, 300, 20, "token", "shared")
    options: dict[str, Any] = {"normalize": 1e-5, "residual": residual, "relu": True, "backend": runner.backend}
    first = fused_linear(x, weight, bias, **options)
    assert torch.equal(first, fused_linear(x, weight, bias, **options))
    assert torch.equal(first, fused_linear(x, weight, bias, constant_weights=True, **options))


@on_triton
def test_opcheck(runner: Runner) -> None:
    x, weight, bias, residual = tensors(runner, 2, 5, 20, 18, "token", "sample")
    shared = x[:1].expand(2, -1, -1)
    leading, (moments, sums) = randn(runner, 2, 3, 18), late(x, weight).values()
    plain, other = (x.dtype, False, False, ()), (FLOAT, True, True, (16, 16, 16, 1, 4, 1))
    torch.library.opcheck(ops.fused_linear_triton, (x, weight, bias, residual, None, 1e-5, None, None, True, *plain))
    given = (shared, weight, None, None, leading, 1e-5, moments, sums, False)
    torch.library.opcheck(ops.fused_linear_triton, (*given, *other))
    for arguments, message in (
        ((x, weight[:, 1:], None, None, None, None, None, None), "weight must be"),
        ((x, weight, randn(runner, 4, 18), None, None, None, None, None), "bias must be"),
        ((x, weight, None, x, None, None, None, None), "residual must be"),
        ((x, weight, None, None, leading[:1], None, None, None), "leading must be"),
        ((x, weight, None, residual, leading, None, None, None), "do not go together"),
        ((x[:, :0], weight, None, None, leading, None, None, None), "x must have tokens"),
        ((x, weight, None, None, None, 1e-5, moments, None), "moments and weight_sums go together"),
        ((x, weight, None, None, None, None, moments, sums), "with normalize alone"),
        ((x, weight, None, None, None, 1e-5, moments[:, 1:], sums), "moments must be"),
        ((x, weight, None, None, None, 1e-5, moments, sums[1:]), "weight_sums must be"),
        ((x[0], weight, None, None, None, None, None, None), "x must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.fused_linear_triton(*arguments, False, *plain)
    with pytest.raises(RuntimeError, match="rows must be one of"):
        ops.fused_linear_triton(x, weight, *[None] * 6, False, x.dtype, False, False, (48, 16, 16, 1, 4, 1))


@pytest.mark.parametrize("dynamic", [False, True])
@on_triton
def test_compiles_without_graph_breaks(runner: Runner, dynamic: bool) -> None:
    torch._dynamo.reset()
    weight, bias = randn(runner, 18, 20), randn(runner, 18)

    def block(x: Tensor) -> Tensor:
        return 2 * fused_linear(x + 1, weight, bias, normalize=1e-5, residual=x[..., :18], backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            x = randn(runner, batch, 5, 20)
            torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


@on_each_backend
def test_gradients_are_refused(runner: Runner) -> None:
    x, weight = randn(runner, 2, 5, 20), nn.Parameter(randn(runner, 18, 20))
    with pytest.raises(RuntimeError, match=r"for inference.*weight requires grad"):
        fused_linear(x, weight, backend=runner.backend)
    with torch.no_grad():
        assert not fused_linear(x, weight, backend=runner.backend).requires_grad


X, W = torch.zeros(2, 5, 20), torch.zeros(18, 20)
M = torch.zeros(2, 5, 1, 3)
LATE = {"normalize": 1e-5, "moments": M, "weight_sums": W[:, 0].contiguous()}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.numpy(), W), {}, TypeError, "x must be a tensor, got ndarray"),
        ((X.int(), W), {}, TypeError, "x must be one of float32.*got torch.int32"),
        ((X, W.half()), {}, TypeError, "weight must be one of float32, got torch.float16"),
        ((X, W, W[:, 0].double()), {}, TypeError, "bias must be one of float32, float16, bfloat16, got"),
        ((X[0, 0], W), {}, ValueError, r"x must be \[..., M, K\]"),
        ((X[..., :0], W[:, :0]), {}, ValueError, "K of at least 1"),
        ((X, W[:, :19]), {}, ValueError, r"weight must be \[N, 20\] for x of \[2, 5, 20\], got \[18, 19\]"),
        ((X.half(), W.to(BFLOAT)), {}, TypeError, "weight must be one of float16, float32, got torch.bfloat16"),
        ((X, W), {"leading": X}, ValueError, r"leading must be \[2, P, 18\] or \[P, 18\], got \[2, 5, 20\]"),
        ((X, W), {"leading": X[..., :18], "residual": X[..., :18]}, ValueError, "do not go together"),
        ((X, W), {"moments": M}, ValueError, "moments and weight_sums go together"),
        ((X, W), {"moments": M, "weight_sums": W[:, 0]}, ValueError, "moments are of use with a layer norm alone"),
        ((X, W), LATE | {"moments": M[:, 1:]}, ValueError, r"moments must be \[2, 5, P, 3\] with P of at least 1, got"),
        ((X, W), LATE | {"moments": M.expand(2, 5, 3, 3)}, ValueError, "last two axes in one piece"),
        ((X, W), LATE | {"weight_sums": W[0]}, ValueError, r"weight_sums must be \[18\], contiguous, got \[20\]"),
        ((X, W), LATE | {"moments": M.double()}, TypeError, "moments must be one of float32, got torch.float64"),
        ((X, W, W[:4, :18]), {}, ValueError, r"bias must be \[18\] or \[5, 18\], got \[4, 18\]"),
        ((X, W), {"residual": X}, ValueError, r"residual must be \[2, 5, 18\] or \[5, 18\], got \[2, 5, 20\]"),
        ((X, W.to("meta")), {}, ValueError, "weight must be on cpu, got meta"),
        ((X, W), {"normalize": True}, TypeError, "normalize must be the epsilon"),
        ((X, W), {"normalize": -1.0}, ValueError, "normalize must be finite and at least 0, got -1.0"),
        ((X, W), {"relu": 1}, TypeError, "relu must be True or False"),
        ((X, W), {"out_dtype": DOUBLE}, TypeError, "out_dtype must be one of float32, float16, bfloat16, got"),
        ((X, W), {"config": (16, 16, 16, 1, 4, 1)}, TypeError, "config must be a LinearConfig, got tuple"),
        ((X, W), {"config": LinearConfig(16, 8, 16, 1, 4, 1)}, ValueError, "columns must be one of 4, 16"),
        ((X, W), {"config": LinearConfig(16, 4, 16, 2, 4, 1)}, ValueError, "shares must be 1 with 4 columns, got 2"),
        ((X, W), {"backend": "cublas"}, ValueError, "backend='cublas' is not known"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_linear(*arguments, **options)


def test_backends_say_why_not() -> None:
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        fused_linear(X.double(), W.double(), backend="triton")
    with pytest.raises(BackendUnavailable, match=r"bfloat16|CPU tensors only in the interpreter"):
        fused_linear(X.to(BFLOAT), W.to(BFLOAT), backend="triton")


@on_cuda
def test_captured_in_a_cuda_graph(runner: Runner) -> None:
    """New numbers, new results; weights may be replaced in place between replays."""
    x, weight, bias, residual = tensors(runner, 1, 445, 512, 512, "token", "sample")
    options: dict[str, Any] = {"normalize": 1e-5, "residual": residual, "constant_weights": True, "backend": "triton"}
    fused_linear(x, weight, bias, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(4):
            y = fused_linear(y, weight, bias, **options)
    for seed in range(2):
        x.copy_(randn(runner, 1, 445, 512, seed=seed))
        weight.copy_(randn(runner, 512, 512, seed=seed) / 23)
        graph.replay()
        expected = x
        for _ in range(4):
            expected = fused_linear(expected, weight, bias, **options)
            torch.cuda.synchronize()
        assert torch.equal(y, expected)


@on_cuda
def test_early_launches_wait_for_what_they_read(runner: Runner) -> None:
    """A long chain without synchronisation, in which other kernels write x, residual and, unless promised, weight."""
    x, weight, bias, residual = tensors(runner, 1, 445, 512, 512, "feature", "sample")

    def run(wait: bool) -> Tensor:
        y, current = x, torch.empty_like(weight)
        for step in range(60):
            torch.mul(weight, (1.0, -1.0, 0.5)[step % 3], out=current)
            y = fused_linear(y, current, bias, normalize=1e-5, residual=residual, backend="triton")
            y = fused_linear(y, weight, bias, normalize=1e-5, residual=y, constant_weights=True, backend="triton")
            if wait:
                torch.cuda.synchronize()
        return y

    expected = run(wait=True)
    for _ in range(3):
        assert torch.equal(run(wait=False), expected)


@pytest.mark.parametrize("element_size", [2, 4])
def test_pinned_tiles_are_possible_and_end_where_the_width_ends(element_size: int) -> None:
    for width in (1, 16, 100, 128, 512, 2048):
        for rows in (1, 49, 445, 14240):
            tile = pinned(rows, 512, width, element_size)
            assert problem(tile) is None
            assert tile.depth * tile.shares < 2 * max(width, 16)


def test_few_rows_get_small_tiles_and_many_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MEASURED", {})
    assert pinned(49, 512, 512, 2)[:2] == (16, 16)
    assert pinned(445, 512, 512, 2)[:2] == (64, 32)
    assert pinned(14240, 512, 512, 2)[:2] == (128, 128)
    assert pinned(14241, 3, 128, 4)[:2] == (32, 4) and pinned(445, 2, 128, 4)[:2] == (16, 4)
    assert pinned(445, 3, 128, 2).columns == 16


def test_a_measured_tile_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves all numbers of rows up to its own; above the last the rule holds again."""
    few, more = LinearConfig(32, 16, 64, 2, 4, 2), LinearConfig(64, 32, 64, 1, 4, 2)
    monkeypatch.setattr(configs, "MEASURED", {(2, 512, 512): ((50, few), (445, more))})
    assert [pinned(rows, 512, 512, 2) for rows in (1, 50, 51, 445)] == [few, few, more, more]
    assert pinned(14240, 512, 512, 2)[:2] == (128, 128)
    assert pinned(50, 512, 2048, 2) != few


def test_the_runners_cover_what_this_machine_has() -> None:
    """Tests above are empty where no runner is found: that must not go unseen."""
    pytest.importorskip("triton")
    assert {dataclasses.astuple(r)[0] for r in TRITON_RUNNERS} >= {"cuda" if torch.cuda.is_available() else "cpu"}
