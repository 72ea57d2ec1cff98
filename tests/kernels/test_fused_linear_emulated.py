"""The linear layer of compute capability 9.0, in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch
from emulation import build
from emulation.linear import linear
from fused_cases import BFLOAT, DOUBLE, FLOAT, HALF, Runner, assert_within_budget, randn
from linear_cases import chain, moments_of, tensors
from torch import Tensor

from fastmetro_kernels.fused import NativeLinearConfig

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
RUNNERS = [Runner("cpu", "native", dtype) for dtype in (HALF, BFLOAT)]
CONFIGS = [
    NativeLinearConfig(32, 1, 4),
    NativeLinearConfig(64, 1, 3),
    NativeLinearConfig(32, 4, 2),
    NativeLinearConfig(64, 2, 2),
]
SIZES = [(1, 256, 16), (65, 272, 48), (50, 512, 80)]
"""Rows, width, features."""
runners = pytest.mark.parametrize("runner", RUNNERS, ids=str)
configs = pytest.mark.parametrize("config", CONFIGS, ids=str)


def check(
    got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, normalize: float | None, relu: bool
) -> None:
    """As near to float64 as plain PyTorch in the dtype of x, but for a rounding of the result and of float32 sums."""
    wide = [None if one is None else one.to(DOUBLE) for one in (x, weight, bias, residual)]
    exact = chain(wide[0], wide[1], wide[2], normalize, wide[3], relu)
    plain = chain(x, weight, bias, normalize, residual, relu)
    size = wide[0].abs() @ wide[1].abs().T
    if normalize is not None:
        size = size / (wide[0].var(-1, keepdim=True, unbiased=False) + normalize).sqrt()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs() + 4 * torch.finfo(FLOAT).eps * (size + exact.abs() + 1)
    assert_within_budget(got, exact, plain, rounding)


@pytest.mark.parametrize("normalize", [None, 1e-5])
@pytest.mark.parametrize("size", SIZES, ids=str)
@configs
@runners
def test_emulated(
    runner: Runner, config: NativeLinearConfig, size: tuple[int, int, int], normalize: float | None
) -> None:
    """A bias per token with a residual, or a shared one with a ReLU; the moments are those of the rounded result."""
    rows, width, features = size
    per_token, relu = config.columns == 32, config.columns == 64
    kinds = ("token", "sample") if per_token else ("feature", None)
    x, weight, bias, residual = (
        None if one is None else one.flatten(0, -2) if one.dim() == 3 else one
        for one in tensors(runner, 1, rows, width, features, *kinds)
    )
    assert x is not None and weight is not None and bias is not None
    sums = {} if normalize is None else {"moments": moments_of(x, 32), "sums": weight.float().sum(1)}
    got, moments = linear(x, weight, bias, config, residual, relu=relu, schedule="random", seed=rows, **sums)
    check(got, x, weight, bias, residual, normalize, relu)
    torch.testing.assert_close(moments, moments_of(got, config.columns), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leads", [1, 70])
@configs
@runners
def test_leading_rows(runner: Runner, config: NativeLinearConfig, leads: int) -> None:
    """They come first as they are, also more of them than a tile has rows; the others are as without them."""
    x, weight, bias, _ = tensors(runner, 1, 20, 256, 48, "token", None)
    assert bias is not None
    leading = randn(runner, leads, 48, seed=4)
    got, moments = linear(x[0], weight, bias, config, leading=leading, relu=True, schedule="random")
    assert torch.equal(got[:leads], leading)
    check(got[leads:], x[0], weight, bias, None, None, True)
    torch.testing.assert_close(moments, moments_of(got, config.columns), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@configs
def test_any_order(config: NativeLinearConfig, schedule: str) -> None:
    x, weight, bias, _ = tensors(RUNNERS[0], 1, 70, 400, 48, "feature", None)
    assert bias is not None
    want, got = (linear(x[0], weight, bias, config, schedule=one, seed=2) for one in ("forward", schedule))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    check(got[0], x[0], weight, bias, None, None, False)
