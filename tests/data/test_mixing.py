"""Mixtures: shares, epochs without repetition, and the same samples for any number of processes and any resumption."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from fastmetro.data.mixing import BLOCK, MixedSampler, Pick, Source

MIX = [Source(0.5, 37), Source(0.2, 1000), Source(0.3)]


def stream(sampler: MixedSampler, steps: range) -> list[Pick]:
    return [pick for step in steps for pick in sampler.picks(step)]


def test_shares_hold_in_every_block() -> None:
    sampler = MixedSampler(MIX, 64, seed=5)
    for start in (0, 7):
        blocks = range(start * BLOCK // 64, (start + 1) * BLOCK // 64)
        counts = Counter(pick.source for pick in stream(sampler, blocks))
        assert [counts[i] for i in range(3)] == [4096, 1638, 2458]
    # Sources are mixed within a step, not one after the other.
    per_step = [Counter(pick.source for pick in sampler.picks(step))[0] for step in range(BLOCK // 64)]
    assert abs(np.mean(per_step) - 32) < 1e-9 and 2 < np.std(per_step) < 6


def test_an_epoch_is_a_permutation_and_each_differs() -> None:
    picks = stream(MixedSampler(MIX, 4, seed=5), range(2 * BLOCK // 4))
    assert [pick.number for pick in picks] == list(range(2 * BLOCK))
    for source, length in ((0, 37), (1, 1000)):
        rows = [pick.row for pick in picks if pick.source == source]
        epochs = [rows[start : start + length] for start in range(0, len(rows) - length, length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 2


def test_rows_of_a_large_source_come_once_per_epoch() -> None:
    length = 3 * BLOCK
    sampler = MixedSampler([Source(1, length), Source(1)], 128, seed=1)
    steps = 2 * length // 128
    first = [pick.row for pick in stream(sampler, range(steps)) if pick.source == 0]
    second = [pick.row for pick in stream(sampler, range(steps, 2 * steps)) if pick.source == 0]
    assert sorted(first) == sorted(second) == list(range(length)) and first != second
    assert np.abs(np.corrcoef(first, second)[0, 1]) < 0.03 and np.abs(np.corrcoef(first, range(length))[0, 1]) < 0.03


def test_endless_sources_count_on() -> None:
    picks = stream(MixedSampler(MIX, 64, seed=5), range(3 * BLOCK // 64))
    endless = [pick.row for pick in picks if pick.source == 2]
    assert endless == list(range(3 * 2458))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_out_the_same_steps(world_size: int) -> None:
    whole = MixedSampler(MIX, 48, seed=3)
    ranks = [MixedSampler(MIX, 48, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 1, BLOCK // 48, 100_000):
        parts = [sampler.picks(step) for sampler in ranks]
        assert {len(part) for part in parts} == {48 // world_size}
        assert [pick for part in parts for pick in part] == whole.picks(step)


def test_a_resumed_sampler_goes_on() -> None:
    whole = list(MixedSampler(MIX, 6, seed=3, steps=3000))
    resumed = MixedSampler(MIX, 6, seed=3, steps=3000, start_step=1700)
    assert list(resumed) == whole[1700:] and len(resumed) == 1300
    assert list(resumed) == whole[1700:]  # again from its start
    assert whole != list(MixedSampler(MIX, 6, seed=4, steps=3000))


def test_it_is_a_batch_sampler() -> None:
    rows = list(range(100, 140))

    class Rows:
        def __getitem__(self, pick: Pick) -> tuple[int, int]:
            return rows[pick.row], pick.number

    sampler = MixedSampler([Source(1, 40)], 8, seed=0, steps=5)
    loader = DataLoader(Rows(), batch_sampler=sampler, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    assert len(loader) == 5
    assert list(loader) == [[(rows[pick.row], pick.number) for pick in sampler.picks(step)] for step in range(5)]
    with pytest.raises(TypeError, match="without steps has no length"):
        len(MixedSampler([Source(1, 40)], 8, seed=0))


def test_small_shares_are_not_lost() -> None:
    sampler = MixedSampler([Source(1e-9, 5), Source(1, 10), Source(1e-9)], BLOCK, seed=0)
    counts = Counter(pick.source for pick in sampler.picks(0))
    assert counts == {0: 1, 1: BLOCK - 2, 2: 1}


def test_samples_of_a_seed_never_change() -> None:
    """Trainings that were begun with an older version go on with the same samples."""
    assert MixedSampler(MIX, 4, seed=3).picks(12345) == EXPECTED


EXPECTED = [Pick(1, 998, 49380), Pick(2, 14807, 49381), Pick(2, 14808, 49382), Pick(0, 8, 49383)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "sources must be 1 to"),
        ({"sources": [Source(0.0, 3)]}, r"sources\[0\].share must be positive"),
        ({"sources": [Source(1, 3), Source(1, 0)]}, r"sources\[1\].length must be"),
        ({"batch_size": 9, "world_size": 2}, "batch_size must be a positive multiple of world_size, got 9 and 2"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"rank": 1}, "rank must satisfy 0 <= rank < 1, got 1"),
        ({"seed": -1}, "seed must satisfy"),
        ({"steps": 3, "start_step": 4}, "start_step must satisfy"),
        ({"start_step": -1}, "start_step must satisfy"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedSampler(**({"sources": MIX, "batch_size": 8, "seed": 0} | arguments))
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        MixedSampler(MIX, 8, 0).picks(-1)
