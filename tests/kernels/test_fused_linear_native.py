"""The native backend of the fused linear layer: what it takes, which tiles there are, and on Hopper its results."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from fused_cases import BFLOAT, FLOAT, HALF, Runner, poisoned_memory, randn
from linear_cases import check, moments_of, tensors
from torch import Tensor

from fastmetro_kernels import BackendUnavailable, backends
from fastmetro_kernels.fused import NativeLinearConfig, fused_linear, fused_linear_moments
from fastmetro_kernels.fused.linear import native
from fastmetro_kernels.fused.linear.native import Given

HERE = torch.cuda.is_available() and not backends.hopper_reasons(native.OPERATOR, torch.device("cuda"), HALF)
RUNNERS = [Runner("cuda", "native", dtype) for dtype in (HALF, BFLOAT)] if HERE else []
on_native = pytest.mark.parametrize("runner", RUNNERS, ids=str)
SIZES = [(445, 512, 1536), (445, 2048, 512), (50, 512, 2048), (49, 512, 640), (1, 16, 16), (65, 80, 48), (130, 144, 80)]
"""Rows, width, features: of FastMETRO, and such as fill no tile."""


def norm(x: Tensor, weight: Tensor, part: int) -> dict[str, Any]:
    """A layer norm in front whose moments are there."""
    return {"normalize": 1e-5, "moments": moments_of(x, part), "weight_sums": weight.float().sum(1)}


@on_native
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64_with_every_tile(runner: Runner, size: tuple[int, int, int]) -> None:
    rows, width, features = size
    for bias, residual, relu in product(("feature", "token"), (None, "sample"), (False, True)):
        x, weight, added, kept = tensors(runner, 1, rows, width, features, bias, residual)
        for config in native.usable(*size)[:: 1 if bias == "token" and relu else 3]:
            check(runner, x, weight, added, residual=kept, relu=relu, config=config)
            part = max(32, -(-width // 16))
            check(runner, x, weight, added, residual=kept, relu=relu, config=config, **norm(x, weight, part))


@on_native
def test_moments_are_those_of_the_rounded_result(runner: Runner) -> None:
    for rows, width, features in SIZES:
        x, weight, bias, residual = tensors(runner, 1, rows, width, features, "feature", "sample")
        for config in native.usable(rows, features, width):
            options: dict[str, Any] = {"residual": residual, "config": config, "backend": "native"}
            with poisoned_memory():
                out, moments = fused_linear_moments(x, weight, bias, **options)
            assert torch.equal(out, fused_linear(x, weight, bias, **options))
            torch.testing.assert_close(moments, moments_of(out, config.columns), rtol=1e-4, atol=1e-4)


@on_native
@pytest.mark.parametrize("leads", [1, 3, 70])
def test_leading_tokens(runner: Runner, leads: int) -> None:
    """They come first as they are, also more of them than a tile has rows; the others are as without them."""
    for (rows, width, features), bias, relu in product(SIZES, ("feature", "token"), (False, True)):
        x, weight, added, _ = tensors(runner, 1, rows, width, features, bias, None)
        leading = randn(runner, 1, leads, features, seed=4)
        for config in native.usable(rows, features, width)[::3]:
            options: dict[str, Any] = {"config": config, "backend": "native"}
            with poisoned_memory():
                got = fused_linear(x, weight, added, leading=leading, relu=relu, **options)
                out, moments = fused_linear_moments(x, weight, added, leading=leading, **options)
            assert torch.equal(got[:, :leads], leading) and torch.equal(out[:, :leads], leading)
            assert torch.equal(got[:, leads:], fused_linear(x, weight, added, relu=relu, **options))
            torch.testing.assert_close(moments, moments_of(out, config.columns), rtol=1e-4, atol=1e-4)


@on_native
def test_a_chain_in_a_cuda_graph(runner: Runner) -> None:
    """A residual stream through norms, as in a transformer, by early launches; the same bits at every replay."""
    x, wide, bias, _ = tensors(runner, 1, 445, 512, 2048, "feature", None)
    back, back_bias = randn(runner, 512, 2048, seed=5) / 90, randn(runner, 512, seed=6)
    sums = wide.float().sum(1)

    def run(backend: str) -> Tensor:
        y, moments = x, moments_of(x, 32)
        for _ in range(8):
            late = {"normalize": 1e-5, "moments": moments, "weight_sums": sums}
            options: dict[str, Any] = {"constant_weights": True, "backend": backend}
            hidden = fused_linear(y, wide, bias, relu=True, **late, **options)
            y, moments = fused_linear_moments(hidden, back, back_bias, residual=y, **options)
        return y

    expected = run("native")
    torch.testing.assert_close(expected, run("reference"), rtol=0.05, atol=0.05 * float(expected.abs().max()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run("native")
    for _ in range(100):
        graph.replay()
        assert torch.equal(y, expected)


@on_native
def test_weights_that_change_are_waited_for(runner: Runner) -> None:
    x, weight, bias, residual = tensors(runner, 1, 445, 512, 512, "feature", "sample")

    def run(wait: bool) -> Tensor:
        y, current = x, torch.empty_like(weight)
        for step in range(60):
            torch.mul(weight, (1.0, -1.0, 0.5)[step % 3], out=current)
            y = fused_linear(y, current, bias, residual=residual, backend="native") / 2
            if wait:
                torch.cuda.synchronize()
        return y

    expected = run(wait=True)
    for _ in range(3):
        assert torch.equal(run(wait=False), expected)


@on_native
def test_nan_stays_in_its_row(runner: Runner) -> None:
    x, weight, bias, _ = tensors(runner, 1, 70, 512, 512, "feature", None)
    x[0, 3, 5] = torch.nan
    got = fused_linear(x, weight, bias, relu=True, backend="native")
    assert bool(got[0, 3].isnan().all()) and int(got.isnan().sum()) == 512


@on_native
def test_opcheck_and_what_auto_takes(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = tensors(runner, 1, 50, 512, 512, "token", "sample")
    assert residual is not None
    rest = (0.0, None, None, False, True, [32, 2, 4, 1])
    for more in ((residual[0], None), (None, randn(runner, 2, 512, seed=3))):
        flat = (x[0], weight, bias, *more, *rest)
        torch.library.opcheck(torch.ops.fastmetro_kernels.fused_linear_native.default, flat)
    config = NativeLinearConfig(64, 4, 2)
    expected = fused_linear(x, weight, bias, config=config)
    monkeypatch.setitem(native.MEASURED, (50, 512, 512), config)
    assert torch.equal(fused_linear(x, weight, bias), expected)
    assert native.choose(Given(x, weight, bias, None, x, None, None, None, x.dtype)) == config
    assert native.choose(Given(x.expand(2, -1, -1), weight, bias, None, x, None, None, None, x.dtype)) is None


def given(x: Tensor, weight: Tensor, bias: Tensor | None, **others: Any) -> Given:
    plain = {"residual": None, "leading": None, "normalize": None, "moments": None, "weight_sums": None}
    return Given(x, weight, bias, **{**plain, "out_dtype": x.dtype, **others})


X, W, B = torch.zeros(1, 5, 32, dtype=HALF), torch.zeros(16, 32, dtype=HALF), torch.zeros(16, dtype=HALF)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (given(X, W, B), None),
        (given(X, W, None), "needs a bias"),
        (given(X, W.float(), B), "weights and gives results of x's dtype"),
        (given(X, W, B, out_dtype=FLOAT), "weights and gives results of x's dtype"),
        (given(X[..., :24].contiguous(), W[:, :24].contiguous(), B), "multiples of 16, got 24 and 16"),
        (given(X, W, B, leading=X[:, :2, :16].contiguous()), None),
        (given(X.repeat(2, 1, 1), W, B, leading=X[..., :16].repeat(2, 1, 1)), "leading tokens of one sample"),
        (given(X[:, :0], W, B, leading=X[..., :16].contiguous()), "leading tokens of one sample that has others"),
        (given(X, W, B, leading=torch.zeros(1, 2, 16)), "leading tokens of x's dtype"),
        (given(X, W, B, normalize=1e-5), "takes the moments"),
        (given(X, W, B, normalize=1e-5, moments=torch.zeros(1, 5, 17, 3)), "up to 16 parts, got 17"),
        (given(X, W, B, residual=torch.zeros(1, 5, 16)), "residual of x's dtype"),
        (given(X.mT.contiguous().mT, W, B), "x must be contiguous"),
        (given(X.flatten()[1:129].view(1, 4, 32), W, B), "x must be contiguous and aligned"),
    ],
)  # fmt: skip
def test_what_it_takes(call: Given, reason: str | None) -> None:
    found = native.reasons(call)
    assert found[0] == "runs on CUDA devices only"
    assert found[1:] == [] if reason is None else len(found) == 2 and reason in found[1]
    assert native.choose(call) is None


def test_every_usable_tile_is_possible() -> None:
    for rows, width, features in SIZES:
        tiles = native.usable(rows, features, width)
        assert tiles and len(set(tiles)) == len(tiles) and not any(map(native.problem, tiles))
        assert all(tile.split <= -(-width // 64) for tile in tiles)
        call = given(X.new_zeros(1, rows, width), W.new_zeros(features, width), B)
        assert native.problem(native.plain(call)) is None and native.plain(call).split <= -(-width // 64)
    assert all(native.problem(tile) is None for tile in native.MEASURED.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NativeLinearConfig(128, 1, 2), "columns must be one of 32, 64, got 128"),
        (NativeLinearConfig(32, 3, 2), "split must be one of 1, 2, 4, 8, got 3"),
        (NativeLinearConfig(32, 1, 17), "stages must be 2 to 16"),
        (NativeLinearConfig(64, 8, 16), "fit 232448 bytes"),
        (NativeLinearConfig(32, 1, 2, 3), "early must be one of"),  # type: ignore[arg-type]
    ],
)
def test_bad_tiles_are_refused(config: NativeLinearConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear(X, W, B, config=config)


def test_asked_for_where_it_cannot_run() -> None:
    for options in ({"backend": "native"}, {"config": NativeLinearConfig(32, 1, 2)}):
        with pytest.raises(BackendUnavailable, match="native: runs on CUDA devices only"):
            fused_linear(X, W, B, **options)
    with pytest.raises(ValueError, match="'apex' is not known; accepted: 'auto', 'reference', 'triton', 'native'"):
        fused_linear(X, W, B, backend="apex")


def test_shapes_are_known_without_running() -> None:
    with torch.device("meta"):
        x, weight, bias = torch.empty(5, 32), torch.empty(80, 32), torch.empty(80)
    out, moments = torch.ops.fastmetro_kernels.fused_linear_native(
        x, weight, bias, None, bias[None], 0.0, None, None, False, True, [32, 1, 2, 1]
    )
    assert out.shape == (6, 80) and moments.shape == (6, 3, 3) and moments.dtype == FLOAT


def test_the_choice_is_traced_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced tensor has no address: the op looks at it when it runs."""
    monkeypatch.setitem(native.MEASURED, (X.shape[0] * X.shape[1], *W.shape), NativeLinearConfig(32, 1, 4))
    torch._dynamo.reset()

    def count(x: Tensor) -> Tensor:
        call = given(x, W, B)
        assert native.choose(call) is None
        return x * len(native.reasons(call))

    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), count(X))
