"""The end of a bottleneck block in one kernel, in the emulator, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulation import build
from ending_cases import Call, check, make, op_arguments
from torch import Tensor

from fastmetro_kernels.convolution.ending_configs import ALONE, FOLLOWED, FOLLOWING, JOINED, MODES, WIDENED

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
HALVES = (torch.float16, torch.bfloat16)
ENDINGS = {ALONE: 0, FOLLOWED: 1, WIDENED: 2, JOINED: 3}
SIZES = [(1, 1, 1), (2, 8, 8), (3, 7, 9), (2, 16, 24)]


def emulate(call: Call, mode: str, most_blocks: int, **options: object) -> tuple[Tensor, Tensor | None]:
    """What ``convolution_ending`` returns; places that the kernel leaves out are NaN."""
    harness = build.build_harness(Path(build.__file__).with_name("ending_harness.cpp"))
    *given, _ = op_arguments(call)
    rows = given[0]
    wide, narrow = (rows.new_full((*rows.shape[:3], depth), torch.nan) for depth in (256, FOLLOWING[mode]))
    harness.run(
        "run_ending",
        *(*given, wide, narrow, *rows.shape[:3], ENDINGS[mode], most_blocks, rows.dtype == torch.bfloat16),
        reads={f"argument {i}": one for i, one in enumerate(given) if one is not None},
        writes={"wide": wide, "narrow": narrow},
        **{"races": "by_barriers", **options},
    )
    made = wide.permute(0, 3, 1, 2), narrow.permute(0, 3, 1, 2)
    return (made[0], None) if call.following is None else made


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_emulated(mode: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Two groups of one block go through several tiles."""
    call = make(size, mode, "cpu", dtype)
    check(emulate(call, mode, 1, schedule="random", seed=sum(size)), call)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
@pytest.mark.parametrize("mode", MODES)
def test_any_order(mode: str, schedule: str) -> None:
    """The same bits, whatever comes first: threads, blocks or copies."""
    call = make((1, 9, 17), mode, "cpu", torch.float16)
    want, got = emulate(call, mode, 1), emulate(call, mode, 2, schedule=schedule, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True) if a is not None and b is not None)
    check(got, call)
