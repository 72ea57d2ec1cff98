"""The tail of a decoder layer on compute capability 9.0, in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch
from decoder_tail_cases import Inputs, exact_and_plain, inputs
from emulation import build
from emulation.tail import tail
from fused_cases import BFLOAT, FLOAT, HALF, Runner, assert_within_budget
from torch import Tensor

from fastmetro_kernels.fused import TailWeights

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
RUNNERS = [Runner("cpu", "native", dtype) for dtype in (HALF, BFLOAT)]
runners = pytest.mark.parametrize("runner", RUNNERS, ids=str)
# Samples, queries, keys, hidden features, blocks: groups with one tile more than others, with none, several samples.
SIZES = [(1, 1, 1, 256, 1), (1, 130, 20, 192, 1), (3, 65, 49, 128, 1), (2, 200, 64, 192, 2), (2, 70, 56, 64, 4)]


def check(got: Tensor, x: Inputs, scale: float | None = None) -> None:
    exact, plain = exact_and_plain(x, scale)
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs() + 64 * torch.finfo(FLOAT).eps * (1 + exact.abs())
    assert_within_budget(got, exact, plain, rounding)


@pytest.mark.parametrize("size", SIZES, ids=str)
@runners
def test_emulated(runner: Runner, size: tuple[int, int, int, int, int]) -> None:
    samples, queries, keys, hidden, blocks = size
    x = inputs(runner, samples, queries, keys, 8, 16, hidden)
    check(tail(x, 0.25, blocks, schedule="random", seed=queries), x)


@pytest.mark.parametrize("schedule", build.SCHEDULES)
def test_in_any_order(schedule: str) -> None:
    x = inputs(RUNNERS[0], 2, 130, 49, 8, 16, 128)
    got = tail(x, 0.25, 1, schedule=schedule, seed=3)
    assert torch.equal(got, tail(x, 0.25, 3))
    check(got, x)


def test_any_strides_and_scales() -> None:
    """Tokens and attention as parts of wider rows, tokens shared by all samples, a negative scale."""
    tokens, attended, k, v, weights = inputs(RUNNERS[0], 2, 30, 20, 8, 16, 64)
    wide = torch.full((2, 30, 400), torch.nan, dtype=HALF)
    wide[:, :, 20:148] = attended
    x = (tokens[:1].expand(2, -1, -1), wide[:, :, 20:148], k, v, weights)
    check(tail(x, -0.5, 1), x, -0.5)


def test_what_is_no_number_stays_in_its_row() -> None:
    tokens, attended, k, v, weights = inputs(RUNNERS[0], 1, 20, 9, 8, 16, 64)
    expected = tail((tokens, attended, k, v, weights), 0.25, 1)
    tokens[0, 7, 3] = torch.nan
    got = tail((tokens, attended, k, v, weights), 0.25, 1)
    assert bool(got[0, 7].isnan().all())
    assert torch.equal(got[0, :7], expected[0, :7]) and torch.equal(got[0, 8:], expected[0, 8:])


def test_large_scores_keep_their_digits() -> None:
    tokens, attended, k, v, weights = inputs(RUNNERS[0], 1, 9, 11, 8, 16, 64)
    x = (tokens, attended, 30 * k, v, TailWeights(*weights))
    check(tail(x, 1.0, 1), x, 1.0)
