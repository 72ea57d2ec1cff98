"""Bulk copies in the emulator: the worked example is right, and each usual mistake is caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulation import build

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
MISTAKES = {
    "no_wait": "a bulk_load of warp 0, lane 0 is under way|race: writes offset",
    "others_do_not_wait": "is under way|has not waited for|race: writes offset",
    "no_fence": "wrote without a bulk_fence since",
    "no_sync_before_store": "race: (reads|writes) offset",
    "overwrites_store": "which a bulk_store of warp 0, lane 0 may still read",
    "no_wait_at_end": "returns from the kernel while its bulk_store",
    "expects_too_much": "waits for ever for bulk copies",
    "wrong_turn": "a bulk_load of warp 0, lane 0 is under way|race: writes offset",
    "not_started": "a barrier for copies that was not started",
    "unordered_start": "uses a barrier for copies that warp 0, lane 0 has started|that was not started",
    "misaligned": "no multiples of 16",
    "past_input": "outside of all buffers",
    "refills_too_early": "race: writes offset|is under way",
}


@pytest.fixture(scope="module")
def bulk() -> build.Harness:
    return build.build_harness(Path(build.__file__).with_name("bulk_harness.cpp"))


def run(
    harness: build.Harness, mistake: int, schedule: str, rounds: int = 3, threads: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel read and what it wrote."""
    x = np.random.default_rng(0).standard_normal((rounds, 4 * threads)).astype(np.float32)
    source = np.frombuffer(bytearray(x.nbytes + 16), np.uint8)
    start = -source.ctypes.data % 16
    inside = source[start : start + x.nbytes].view(np.float32).reshape(x.shape)
    inside[:] = x
    room = np.zeros(x.nbytes + 16, np.uint8)
    out = room[-room.ctypes.data % 16 :][: x.nbytes].view(np.float32).reshape(x.shape)
    harness.run(
        "run_double", inside, out, rounds, threads, mistake,
        reads={"in": inside}, writes={"out": out}, schedule=schedule,
    )  # fmt: skip
    return x, out


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize(("rounds", "threads"), [(1, 4), (2, 40), (5, 96)])
def test_copies_there_and_back(bulk: build.Harness, rounds: int, threads: int, schedule: str) -> None:
    x, out = run(bulk, 0, schedule, rounds, threads)
    np.testing.assert_array_equal(out, 2 * x)


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(bulk: build.Harness, mistake: str, schedule: str) -> None:
    with pytest.raises(build.EmulationError, match=MISTAKES[mistake]):
        run(bulk, 1 + list(MISTAKES).index(mistake), schedule, rounds=1 if mistake == "past_input" else 3)
