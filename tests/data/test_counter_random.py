import math
import zlib

import pytest
import torch
from scipy import stats

from fastmetro.data.counter_random import CounterRandom, StreamPlan

MASK = 0xFFFFFFFF


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def _bits(seed: int, index: int, name: str, lane: int) -> int:
    """The same definition in Python integers."""
    first, second = (
        _mix(_mix(_mix((_mix((index & MASK) ^ word) + (seed & MASK)) & MASK) ^ (index >> 32)) ^ (seed >> 32))
        for word in (0x9E3779B9, 0x85EBCA6B)
    )
    stream = zlib.crc32(name.encode())
    return _mix(_mix((lane * 0x9E3779B9 + _mix(first ^ stream)) & MASK) ^ _mix(second ^ stream))


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**62 + 11])
def test_bits_are_the_written_definition(device, seed):
    indices = [0, 1, 5, 2**31, 2**40 + 3]
    drawn = CounterRandom(seed, torch.tensor(indices, device=device)).bits("pose", 3, 2).cpu()
    for row, index in enumerate(indices):
        expected = [_bits(seed, index, "pose", lane) for lane in range(6)]
        assert drawn[row].flatten().tolist() == expected


def test_sample_does_not_depend_on_its_batch():
    whole = CounterRandom(3, torch.arange(100))
    part = CounterRandom(3, torch.tensor([17, 99, 2]))
    for draw in (lambda r: r.uniform("a", 4), lambda r: r.normal("b", 2, 3), lambda r: r.integers("c", 10, 5)):
        assert torch.equal(draw(whole)[[17, 99, 2]], draw(part))


def test_uniform_and_normal_distributions():
    rng = CounterRandom(11, torch.arange(20000))
    uniform, normal = rng.uniform("u", 5), rng.normal("n", 5)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3


def test_streams_lanes_samples_and_seeds_are_uncorrelated():
    rng = CounterRandom(0, torch.arange(40000))
    base = rng.uniform("a", 2)
    others = [
        base[:, 1],
        rng.uniform("b"),
        CounterRandom(1, torch.arange(40000)).uniform("a"),
        CounterRandom(0, torch.arange(1, 40001)).uniform("a"),
        CounterRandom(2**40, torch.arange(40000)).uniform("a"),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base[:, 0], other]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(40000)


def test_no_two_samples_share_a_key():
    drawn = CounterRandom(0, torch.arange(300_000)).bits("a", 2)
    assert torch.unique(drawn[:, 0] * 2**31 + (drawn[:, 1] >> 1)).numel() == 300_000


def test_choice_and_integers_follow_their_weights():
    rng = CounterRandom(5, torch.arange(50000))
    counts = torch.bincount(rng.choice("kind", [1, 0, 2, 1]), minlength=4).double()
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3]].numpy(), [12500, 25000, 12500]).pvalue > 1e-3
    counts = torch.bincount(rng.integers("i", 7), minlength=7).double()
    assert counts.numel() == 7 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert abs(rng.chance("c", 0.3).float().mean() - 0.3) < 0.02


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="indices must be an int64"):
        CounterRandom(0, torch.zeros(3))
    with pytest.raises(ValueError, match=r"indices must have shape \[B\]"):
        CounterRandom(0, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed must satisfy"):
        CounterRandom(-1, torch.arange(2))
    with pytest.raises(ValueError, match="weights"):
        CounterRandom(0, torch.arange(2)).choice("x", [0.0, 0.0])


def test_plan_changes_no_number(device):
    """A batch under a plan, its first and its later uses, against the same draws without one."""
    plan = StreamPlan()
    for first in (0, 40, 80):
        indices = torch.arange(first, first + 6, device=device)
        plain, planned = CounterRandom(9, indices), CounterRandom(9, indices, plan)
        for draw in (
            lambda r: r.bits("a"),
            lambda r: r.bits("a", 3),
            lambda r: r.uniform("b", 2, 5),
            lambda r: r.normal("c", 4),
            lambda r: r.choice("d", [1, 2, 3]),
            lambda r: r.bits("large", StreamPlan.LARGEST + 1),
            lambda r: r.bits("empty", 0),
        ):
            assert torch.equal(draw(plain), draw(planned))
    assert plan.offset("b", 10) is not None
    assert plan.offset("large", StreamPlan.LARGEST + 1) is None


def test_lanes_are_made_once(device):
    plan = StreamPlan()
    assert torch.equal(plan.lanes(5, device), torch.arange(5, device=device))
    assert plan.lanes(5, device) is plan.lanes(5, device)
    assert plan.lanes(6, device) is not plan.lanes(5, device)
