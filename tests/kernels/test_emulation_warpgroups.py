"""Compute capability 9.0 in the emulator: the worked example is right, and each usual mistake is caught."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from emulation import build

SCHEDULES = build.SCHEDULES
pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))


@pytest.fixture(scope="module")
def warpgroups() -> build.Harness:
    return build.build_harness(Path(build.__file__).with_name("warpgroups_harness.cpp"))


class Product(NamedTuple):
    """float16 [64, 64] each: out is to be rows times the transposed weights."""

    rows: np.ndarray
    weights: np.ndarray
    out: np.ndarray

    def assert_right(self) -> None:
        """The numbers are small integers, so that nothing is rounded."""
        np.testing.assert_array_equal(self.out, self.rows.astype(float) @ self.weights.astype(float).T)


def product() -> Product:
    random = np.random.default_rng(3)
    numbers = [random.integers(-4, 5, (64, 64)).astype(np.float16) for _ in range(2)]
    return Product(*map(build.guarded, (*numbers, np.full((64, 64), np.nan, np.float16))))


def run(harness: build.Harness, p: Product, mistake: int = 0, schedule: str = "forward", seed: int = 0) -> None:
    buffers = {"reads": {"rows": p.rows, "weights": p.weights}, "writes": {"out": p.out}}
    harness.run("run_product", *p, mistake, **buffers, schedule=schedule, seed=seed, races="by_barriers")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_example(warpgroups: build.Harness, schedule: str, seed: int) -> None:
    p = product()
    run(warpgroups, p, schedule=schedule, seed=seed)
    p.assert_right()


LANE = r"warp \d, lane \d+"
EARLY = (
    r"reads offset \d+ of shared memory, where what was asked for has not arrived"
    r"|race: reads offset \d+ of shared memory, which what was asked for has written: no barrier is between them"
    r"|race: writes offset \d+ of shared memory, which warp \d has read: no barrier is between them"
)
ALWAYS = {
    1: EARLY,
    2: rf"{EARLY}|waits for ever in barrier_wait",  # for the phase after, if the copies come at once
    3: r"waits for ever in barrier_wait at warpgroups.cuh:\d+, for phase 0 of .*: 0 of 1 arrivals and 16 bytes are",
    4: r"names a barrier that barriers_ready has not made visible",
    5: r"a product without products_begin in front of its group",
    7: r"writes offset \d+ of shared memory, which a product of warp \d reads \(warpgroups.cuh:\d+\)",
    8: rf"reads offset \d+ of shared memory, which {LANE} has written without shared_stores_ready",
    9: rf"reads offset \d+ of shared memory, which {LANE} has written without shared_stores_ready"
    r"|race: (reads|writes) offset \d+ of shared memory, which warp \d has (written|read): no barrier is between them",
    10: r"returns from the kernel while a store of a box reads its shared memory",
    11: r"returns from the kernel while a store of a box reads its shared memory",
    13: r"waits for ever in group_sync at warpgroups.cuh:\d+, where 64 of 128 threads have arrived",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mistake", ALWAYS)
def test_mistakes_are_caught(warpgroups: build.Harness, mistake: int, schedule: str) -> None:
    with pytest.raises(build.EmulationError, match=ALWAYS[mistake]) as caught:
        run(warpgroups, product(), mistake, schedule)
    assert str(caught.value).startswith("block (0, 0, 0), warp")
    p = product()
    run(warpgroups, p, schedule=schedule)  # a failed launch leaves nothing behind
    p.assert_right()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mistake", [6, 12])
def test_mistakes_show_as_wrong_results(warpgroups: build.Harness, mistake: int, schedule: str) -> None:
    """Sums that are used too early, and a wrong swizzle."""
    p = product()
    run(warpgroups, p, mistake, schedule)
    with pytest.raises(AssertionError):
        p.assert_right()
