"""Wall-clock latencies of things that take turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: percentiles, the fastest and the mean, of `calls` calls."""

    p50: float
    p90: float
    p99: float
    fastest: float
    mean: float
    calls: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Summarise times; percentiles are interpolated linearly.

        Raises:
            ValueError: there is no time.
        """
        if not milliseconds:
            raise ValueError("milliseconds: at least one time is needed")
        p50, p90, p99 = (float(value) for value in np.percentile(milliseconds, [50, 90, 99]))
        return cls(p50, p90, p99, min(milliseconds), statistics.fmean(milliseconds), len(milliseconds))


@contextlib.contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Whether float32 matrix products and convolutions on a GPU may use TF32; restored afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Call, device: torch.device) -> float:
    """Wall time of one call, waited for before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def alternate(calls: Sequence[Call], device: torch.device, seconds: float, rounds: int) -> list[list[list[float]]]:
    """Time the calls in turn.

    In each round every call is made once untimed, because another one has just filled the caches, and then for its
    share of `seconds`, once at least.

    Args:
        calls: what to time; warm already.
        device: waited for before and after each timed call.
        seconds: time for the timed calls of each.
        rounds: how often they take turns.

    Returns:
        Milliseconds by call, round and repetition.
    """
    samples: list[list[list[float]]] = [[] for _ in calls]
    share = 1e3 * seconds / rounds
    for _ in range(rounds):
        for call, mine in zip(calls, samples, strict=True):
            call()
            times = [milliseconds(call, device)]
            while sum(times) < share:
                times.append(milliseconds(call, device))
            mine.append(times)
    return samples


def median_ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> float:
    """How many times longer `slow` takes: the median over the rounds of the ratio of the rounds' medians."""
    rounds = zip(slow, fast, strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in rounds)
