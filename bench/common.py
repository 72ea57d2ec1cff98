"""What all benchmarks share: the record of where a figure was taken, timing, CUDA graphs, and whole CSV files."""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import importlib.metadata
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmetro.profiling.record import commit, device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SHARED = ROOT.parent / "shared"
"""Published data for comparisons; benchmarks must also run where it is absent."""
_THREADS = 16


def environment(device: torch.device) -> dict[str, str]:
    """Columns that every row of a CSV carries."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command_line(),
    }


def command_line() -> str:
    """How this program was called, without the places of a machine: "python -m bench fps --cases s-r50-1"."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.is_relative_to(ROOT):  # of `python -m a.b`, which Python puts there as a file
        program = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    module = program.split(" ") if program.startswith("bench ") else [program]  # "bench fps", as __main__ has it
    return shlex.join(["python", "-m", *module, *arguments])


def op_parser(name: str, description: str | None, dtype: bool = True) -> argparse.ArgumentParser:
    """Of `python -m bench NAME` for one op: with the options that all of these have; with `dtype`, also that one."""
    parser = argparse.ArgumentParser(
        f"python -m bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if dtype:
        parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all-configs", action="store_true", help="every tile is a contender, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    return parser


def results_csv(name: str, device: torch.device) -> Path:
    """`<name>_cpu.csv` of the results, or after the GPU's name `<name>_h200.csv`."""
    machine = "cpu"
    if device.type == "cuda":
        product = re.sub(r"^nvidia[ _-]*", "", device_name(device).lower())
        machine = re.sub(r"[^a-z0-9]+", "_", product).strip("_")
    return RESULTS / f"{name}_{machine}.csv"


def versions() -> dict[str, str]:
    """Versions beside torch's that decide how fast a GPU runs: Triton and the CUDA that torch was built with."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"triton": triton, "cuda": torch.version.cuda or ""}


def clocks(device: torch.device) -> tuple[str, str]:
    """Clocks of the multiprocessors and of the memory in MHz, now; empty where nvidia-smi cannot tell."""
    if device.type != "cuda":
        return "", ""
    name = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    chosen = ["-i", name if name.startswith("GPU-") else f"GPU-{name}"] if name else []
    query = ["nvidia-smi", *chosen, "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    values = answer.stdout.partition("\n")[0].split(",")
    if answer.returncode or len(values) != 2:
        return "", ""
    sm, memory = (value.strip() if value.strip().isdigit() else "" for value in values)
    return sm, memory


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured CUDA graph of several calls; `last` is what the last of them returned, written by every replay."""

    graph: torch.cuda.CUDAGraph
    calls: int
    last: Any

    def milliseconds(self, settle: bool = True) -> float:
        """Device time of one call in one replay.

        With `settle`, an untimed replay runs right before the timed one, so that the time between submitting and
        starting the graph is not counted.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if settle:
            self.graph.replay()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.calls


def capture(calls: Sequence[Callable[[], Any]], keep: int = 1) -> Graph:
    """Captures the calls into one CUDA graph. The first must have run before, so that everything is compiled.

    The last `keep` results stay alive while capturing, so that as many calls in a row write to different memory.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept: collections.deque[Any] = collections.deque(maxlen=keep)
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    return Graph(graph, len(calls), kept[-1])


def copy_bandwidth(device: torch.device, size: int = 1 << 30, copies: int = 10, repeats: int = 5) -> float:
    """Bytes per second, read plus written, of copying `size` bytes (far more than L2) within a CUDA device.

    Not in a graph: there a copy becomes a node of another kind, which on an H200 reaches 2.8 TB/s instead of 4.2.
    """
    size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.randint(1 << 30, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    with torch.cuda.device(device):
        times = [_copies_milliseconds(source, target, copies) for _ in range(repeats)]
    return 2 * source.numel() * 4 * copies / (statistics.median(times) / 1e3)


def _copies_milliseconds(source: torch.Tensor, target: torch.Tensor, copies: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(copies):
        target.copy_(source)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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


def precompile(jobs: Sequence[Callable[[], Any]], device: torch.device) -> tuple[int, float]:
    """Runs calls once in parallel threads, so that their kernels are compiled; how many, and seconds.

    What fails here fails again later, where it is told.
    """

    def run(job: Callable[[], Any]) -> None:
        with contextlib.suppress(Exception), torch.no_grad(), torch.cuda.device(device):
            job()

    start = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(run, jobs))
    torch.cuda.synchronize(device)
    return len(jobs), time.perf_counter() - start
