"""Convolutions on compute capability 9.0, in the emulator, against float64: forward.cuh, near.cuh and pair.cuh."""

from __future__ import annotations

from typing import Any

import pytest
import test_convolution as single
import test_convolution_pair as double
import torch
from emulation import build
from emulation.convolution import convolution
from torch import Tensor

from fastmetro_kernels.convolution import ConvolutionConfig, ConvolutionWeights

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
HALVES = (torch.float16, torch.bfloat16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
CONFIGS = [
    ConvolutionConfig(32, 2, 2),
    ConvolutionConfig(64, 1, 2),
    ConvolutionConfig(64, 4, 3),
    ConvolutionConfig(128, 1, 3, groups=2),
]
SHAPES = [  # images, height, width, channels in and out, kernel, stride
    (3, 1, 1, 256, 16, 1, 1),
    (2, 8, 8, 64, 64, 3, 1),
    (3, 7, 9, 48, 80, 3, 1),
    (2, 13, 9, 128, 144, 3, 2),
    (1, 16, 24, 272, 48, 1, 2),
]
REPEATED = [
    (ConvolutionConfig(32, 2, 2), 3),
    (ConvolutionConfig(64, 1, 2), 3),
    (ConvolutionConfig(32, 4, 2), 4),
    (ConvolutionConfig(64, 4, 2), 4),
    (ConvolutionConfig(32, 8, 2), 8),
]
ONCE = [
    ConvolutionConfig(32, 1, 2),
    ConvolutionConfig(64, 1, 2),
    ConvolutionConfig(32, 2, 1),
    ConvolutionConfig(64, 4, 1),
]


def check(got: Tensor, want: Tensor) -> None:
    """Every number is right to one rounding and the sums' error in float32."""
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0.51 * torch.finfo(got.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@halves
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, config: ConvolutionConfig) -> None:
    """With a residual and a second input, which lies behind the others in the depth."""
    x, weights, kept, branch, exact = single.make(shape, "cpu", dtype, True, True)
    got = convolution(x, weights, config, kept, branch, schedule="random", seed=sum(shape))
    check(got[0], exact.relu())


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_forward_in_any_order(config: ConvolutionConfig, schedule: str) -> None:
    x, weights, _, _, exact = single.make((2, 9, 9, 112, 32, 3, 1), "cpu", torch.float16)
    got = convolution(x, weights, config, relu=False, schedule=schedule, seed=3)
    assert torch.equal(got[0], convolution(x, weights, config, relu=False)[0])
    check(got[0], exact)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("config", "scale"), REPEATED, ids=str)
@halves
def test_repeated_results(dtype: torch.dtype, config: ConvolutionConfig, scale: int, late: bool) -> None:
    x, weights, _, branch, exact = single.make((2, 5, 9, 48, 80, 3, 1), "cpu", dtype, second=True)
    exact = exact.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    kept = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = convolution(x, weights, config, kept, branch, late=late, scale=scale, schedule="random")
    check(got[0], exact.relu() + kept.double() if late else (exact + kept.double()).relu())
    check(convolution(x, weights, config, second=branch, scale=scale)[0], exact.relu())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("config", ONCE, ids=str)
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 8, 8), (3, 7, 9), (1, 16, 24)], ids=str)
@halves
def test_one_copy_for_all_taps(
    dtype: torch.dtype, size: tuple[int, int, int], config: ConvolutionConfig, residual: bool
) -> None:
    channels = {1: 176, 2: 80, 4: 208}[config.split]
    x, weights, kept, _, exact = single.make((*size, channels, 48, 3, 1), "cpu", dtype, residual)
    got = convolution(x, weights, config._replace(once=True), kept, late=residual, schedule="random", seed=sum(size))
    if residual:
        assert kept is not None
        exact = (exact - kept.double()).relu() + kept.double()
    check(got[0], exact.relu() if not residual else exact)


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 176, 256, 64, 0, 1), (1, 9, 7, 48, 512, 256, 80, 2), (3, 1, 1, 16, 256, 128, 0, 1)], ids=str
)
@halves
def test_pair(dtype: torch.dtype, shape: tuple[int, ...], schedule: str) -> None:
    call: tuple[Any, ConvolutionWeights, ConvolutionWeights, Any, Any] = double.make(shape, dtype=dtype)
    x, weights, following, kept, branch = call
    config = ConvolutionConfig(128, 1, 2)
    got = convolution(x, weights, config, kept, branch, following=following, schedule=schedule, seed=1)
    for mine, want in zip(got, double.exact(*call, got[0]), strict=True):
        check(mine, want)
