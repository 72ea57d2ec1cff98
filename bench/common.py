"""What all benchmarks share: the record of where a figure was taken, paired timing, and whole CSV files."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SHARED = ROOT.parent / "shared"
"""Published data for comparisons; benchmarks must also run where it is absent."""


def device_name(device: torch.device) -> str:
    """The product name of the chip that runs the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def commit() -> str:
    """Hash of the commit that is checked out, with `+` when tracked files differ from it.

    The environment variable `FASTMETRO_COMMIT` names it where the files are a copy without its history.
    """
    if named := os.environ.get("FASTMETRO_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "csrc", "fastmetro_kernels"], cwd=ROOT)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def environment(device: torch.device) -> dict[str, str]:
    """Columns that every row of a CSV carries."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m", *sys.argv]),
    }


@dataclass(frozen=True)
class Paired:
    """Two things timed in turn: medians and fastest calls in milliseconds, and two ratios second / first.

    `ratio` is the median of the ratios of the pairs, `fastest_ratio` that of the fastest calls: on a machine that does
    other work too, the fastest call is the one that was least disturbed.
    """

    first_ms: float
    second_ms: float
    first_fastest_ms: float
    second_fastest_ms: float
    ratio: float

    @property
    def fastest_ratio(self) -> float:
        """Second / first of the fastest calls."""
        return self.second_fastest_ms / self.first_fastest_ms


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def alternate(
    first: Callable[[], Any], second: Callable[[], Any], device: torch.device, repeats: int, inner: int = 1
) -> Paired:
    """Times the two in turn, so that a busy machine slows both; `first` counts as the median of `inner` calls."""
    for run in (first, second):
        run()
    pairs, fastest = [], float("inf")
    for _ in range(repeats):
        times = [milliseconds(first, device) for _ in range(inner)]
        fastest = min(fastest, *times)
        pairs.append((statistics.median(times), milliseconds(second, device)))
    return Paired(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        fastest,
        min(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows (all with the same columns) as a whole file or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
