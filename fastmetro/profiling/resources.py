"""Memory and energy, where the device tells."""

from __future__ import annotations

import gc
import statistics
import threading
import time

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


class _PowerSampler(threading.Thread):
    """Asks for the power draw again and again until it is stopped."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self._device = device
        self._stopped = threading.Event()
        self.watts: list[float] = []

    def run(self) -> None:
        while not self._stopped.is_set():
            if (value := power_draw(self._device)) is None:
                return
            self.watts.append(value)

    def stop(self) -> list[float]:
        self._stopped.set()
        self.join()
        return self.watts


def power_draw(device: torch.device) -> float | None:
    """Watts that the whole GPU draws now; None where nvidia-smi does not tell."""
    for field in ("power.draw.instant", "power.draw"):
        if values := ask_gpu(device, field):
            return values[0]
    return None


def joules_per_call(call: Call, device: torch.device, seconds: float) -> float | None:
    """Energy of one call: mean power draw of the whole device while calls follow one another, times their duration.

    Args:
        call: warm already.
        device: a CUDA device; for others nobody tells.
        seconds: how long to call; shorter than about half a second there are few samples of the power.

    Returns:
        Joules, or None where the device does not tell.
    """
    if power_draw(device) is None:
        return None
    until = time.perf_counter() + min(0.3, seconds)
    while time.perf_counter() < until:  # the draw follows the work with a delay
        call()
        synchronize(device)
    sampler = _PowerSampler(device)
    sampler.start()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or calls == 0:
        call()
        synchronize(device)
        calls += 1
    elapsed = time.perf_counter() - start
    watts = sampler.stop()
    return statistics.fmean(watts) * elapsed / calls if watts else None
