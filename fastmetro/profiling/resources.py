"""Memory, energy and the clock under load, where the device tells."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from typing import NamedTuple

import torch

from fastmetro.profiling.latency import Call, synchronize
from fastmetro.profiling.record import ask_gpu

_MIB = 2.0**20


class MemoryMeter:
    """GPU memory that something takes from PyTorch's allocator; made before that something is built."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._held()

    def mebibytes(self, call: Call) -> float | None:
        """What is held since the meter was made, weights and CUDA graphs, plus what one call adds at its peak.

        None on a CPU, where memory cannot be told apart.
        """
        if self._device.type != "cuda":
            return None
        self._held()
        torch.cuda.reset_peak_memory_stats(self._device)
        call()
        synchronize(self._device)
        return (torch.cuda.max_memory_reserved(self._device) - self._before) / _MIB

    def _held(self) -> int:
        """Reserved bytes after everything unused was given back."""
        if self._device.type != "cuda":
            return 0
        gc.collect()
        synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)


class Load(NamedTuple):
    """What the whole GPU does while calls follow one another.

    Attributes:
        joules: energy of one call: mean power times the call's duration.
        watts: mean power. Where it is the board's limit, the clock falls, and energy is what a call costs.
        sm_mhz: median clock of the multiprocessors.
    """

    joules: float
    watts: float
    sm_mhz: float


class _Sampler(threading.Thread):
    """Asks for power and clock again and again until it is stopped."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self._device = device
        self._stopped = threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._stopped.is_set():
            if (sample := power_and_clock(self._device)) is None:
                return
            self.samples.append(sample)

    def stop(self) -> list[tuple[float, float]]:
        self._stopped.set()
        self.join()
        return self.samples


def power_and_clock(device: torch.device) -> tuple[float, float] | None:
    """Watts that the whole GPU draws now and its multiprocessors' MHz; None where nvidia-smi does not tell."""
    for field in ("power.draw.instant", "power.draw"):
        if values := ask_gpu(device, field, "clocks.sm"):
            return values[0], values[1]
    return None


def load_of_calls(call: Call, device: torch.device, seconds: float) -> Load | None:
    """Energy, power and clock of calls that follow one another.

    Args:
        call: warm already.
        device: a CUDA device; for others nobody tells.
        seconds: how long to call; shorter than about half a second there are few samples.

    Returns:
        The load, or None where the device does not tell.
    """
    if power_and_clock(device) is None:
        return None
    until = time.perf_counter() + min(0.3, seconds)
    while time.perf_counter() < until:  # the draw follows the work with a delay
        call()
        synchronize(device)
    sampler = _Sampler(device)
    sampler.start()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or calls == 0:
        call()
        synchronize(device)
        calls += 1
    elapsed = time.perf_counter() - start
    samples = sampler.stop()
    if not samples:
        return None
    watts = statistics.fmean(power for power, _ in samples)
    return Load(watts * elapsed / calls, watts, statistics.median(clock for _, clock in samples))
