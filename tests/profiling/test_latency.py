"""Percentiles, turns and ratios on known numbers."""

from __future__ import annotations

import pytest
import torch

from fastmetro.profiling import latency
from fastmetro.profiling.latency import Latency, alternate, median_ratio, tensor_float_32

CPU = torch.device("cpu")


def test_percentiles_of_known_numbers() -> None:
    found = Latency.of([float(value) for value in range(100, -1, -1)])  # 0 ... 100, any order
    assert (found.p50, found.p90, found.p99) == (50.0, 90.0, 99.0)
    assert (found.fastest, found.mean, found.calls) == (0.0, 50.0, 101)
    assert Latency.of([1.0, 2.0]).p90 == pytest.approx(1.9)  # between them
    with pytest.raises(ValueError, match="at least one time"):
        Latency.of([])


def test_ratio_is_the_median_of_rounds() -> None:
    slow = [[4.0, 4.0, 100.0], [6.0], [80.0]]
    fast = [[2.0, 2.0, 50.0], [2.0], [2.0]]
    assert median_ratio(slow, fast) == 3.0
    with pytest.raises(ValueError):
        median_ratio(slow, fast[:2])


def test_turns_are_taken_and_warm_ups_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    timed: list[str] = []

    def milliseconds(call: latency.Call, device: torch.device) -> float:
        call()
        timed.append(order[-1])
        return {"a": 1.0, "b": 2.5}[order[-1]]

    monkeypatch.setattr(latency, "milliseconds", milliseconds)
    samples = alternate([lambda: order.append("a"), lambda: order.append("b")], CPU, seconds=0.006, rounds=2)
    assert samples == [[[1.0] * 3] * 2, [[2.5] * 2] * 2]  # 3 ms a round
    assert "".join(order) == "aaaa" + "bbb" + "aaaa" + "bbb"
    assert "".join(timed) == "aaabb" * 2


def test_slow_calls_are_made_once_a_round() -> None:
    calls: list[int] = []
    samples = alternate([lambda: calls.append(1)], CPU, seconds=1e-9, rounds=3)
    assert [len(times) for times in samples[0]] == [1, 1, 1] and len(calls) == 6


def test_tf32_is_restored_also_after_an_error() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match="inside"), tensor_float_32(True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        raise RuntimeError("inside")
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
