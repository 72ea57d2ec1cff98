"""Times of all contenders on one case and pass.

Each contender is held against float64, captured into CUDA graphs, and then all are timed in turn, round by round, so
that drifting clocks hit all alike. "warm" repeats the call on one set of tensors and may reuse the output's memory;
"cold" goes through so many sets, outputs included, that they are not in L2 (only where `MAX_SETS` are enough). "call"
is a single call from Python, waited for.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import common
from bench.upsampling.cases import L2_FACTOR, WRITES, Case, Run, contenders
from fastmetro_kernels import BackendUnavailable

GRAPH_MS = 0.5  # a graph takes at least about this long, so that its ends do not count
GRAPH_CALLS = 256
ROUNDS = (3, 30)
OURS_PREFIXES = ("ours", "variant")
SLOW_MS = 2000.0  # a contender whose single calls have taken this long is not called further


@dataclass
class Entry:
    """One contender: why it was not timed, or milliseconds per round by "warm", "cold" and "call"."""

    name: str
    error: float | None = None
    note: str = ""
    wrong: bool = False
    graphs: dict[str, common.Graph] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, kind: str) -> float | None:
        """Median of the rounds in milliseconds, None where that was not timed."""
        return statistics.median(self.samples[kind]) if self.samples.get(kind) else None


def measure(case: Case, which: str, variants: bool, rounds: int, seconds: float) -> list[Entry]:
    """Entries of all contenders; those that could not run carry a note."""
    sets = case.sets(which)
    oracles = case.oracle(which, *sets[0])
    limit = _limit(case, oracles, sets[0])
    entries, given = [], {}
    with torch.no_grad():
        runs = contenders(case, which, variants)
        for name, run in runs.items():
            entries.append(entry := Entry(name))
            given[name] = [case.given(name, one) for one in sets]
            try:
                _check(entry, run, given[name][0], oracles, limit)
                if not entry.wrong and case.on_gpu:
                    _capture(entry, run, case, which, given[name], limit)
            except (BackendUnavailable, RuntimeError, NotImplementedError) as problem:
                entry.graphs.clear()
                entry.note = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        able = [entry for entry in entries if not entry.wrong and (entry.error is not None or entry.name in WRITES)]
        _time(able, runs, given, case.device, rounds, seconds)
    for entry in entries:
        entry.graphs.clear()
    return entries


def _limit(case: Case, oracles: Sequence[Tensor], tensors: tuple[Tensor, Tensor]) -> float:
    """The error allowed to ours: twice that of the dense product in the same dtype, and one rounding."""
    dense = case.matrix.to_dense(case.dtype)
    products = {case.out_shape: lambda: dense @ tensors[0], case.x_shape: lambda: dense.T @ tensors[1]}
    return max(
        2 * _error((products[tuple(oracle.shape)](),), (oracle,))
        + torch.finfo(case.dtype).eps * oracle.abs().max().item()
        for oracle in oracles
    )


def _error(results: Sequence[Tensor], oracles: Sequence[Tensor]) -> float:
    worst = torch.stack([(got.double() - oracle).abs().max() for got, oracle in zip(results, oracles, strict=True)])
    return worst.max().item()  # NaN, which unwritten memory holds, wins over every number


def _check(entry: Entry, run: Run, tensors: tuple[Tensor, Tensor], oracles: Sequence[Tensor], limit: float) -> None:
    """Sets the error, and `wrong` where one of ours exceeds the limit."""
    if entry.name in WRITES:
        run(*tensors)
        return
    ours = entry.name.startswith(OURS_PREFIXES)
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(ours)  # fills fresh memory with NaN
    try:
        entry.error = _error(run(*tensors), oracles)
    finally:
        torch.use_deterministic_algorithms(previous)
    if not entry.error <= limit:
        entry.wrong = ours
        entry.note = f"error above the {limit:.2g} allowed to ours"


def _capture(entry: Entry, run: Run, case: Case, which: str, sets: list[tuple[Tensor, Tensor]], limit: float) -> None:
    """Graphs of as many calls as fill half a millisecond; what a graph computes is checked too."""
    trial = common.capture([functools.partial(run, *sets[0])] * 4)
    calls = max(2, min(GRAPH_CALLS, round(GRAPH_MS / min(trial.milliseconds() for _ in range(3)))))
    entry.graphs["warm"] = common.capture([functools.partial(run, *sets[0])] * calls)
    if len(sets) * case.set_bytes(which) >= L2_FACTOR * case.l2:
        rotating = [functools.partial(run, *one) for one in sets] * max(1, round(calls / len(sets)))
        entry.graphs["cold"] = common.capture(rotating, keep=len(sets))
    if not entry.name.startswith(OURS_PREFIXES):
        return
    for kind, graph in entry.graphs.items():
        graph.milliseconds()
        error = _error(graph.last, case.oracle(which, *(sets[0] if kind == "warm" else sets[-1])))
        if not error <= 2 * limit:  # which was made for other numbers of the same kind
            entry.wrong, entry.note = True, f"error {error:.2g} in a CUDA graph, {limit:.2g} allowed"


def _time(
    entries: list[Entry], runs: dict[str, Run], given: dict[str, list[tuple[Tensor, Tensor]]], device: torch.device,
    rounds: int, seconds: float,
) -> None:  # fmt: skip
    """Rounds over all entries until `rounds` are done or the time is spent."""
    start = time.perf_counter()
    for index in range(rounds or ROUNDS[1]):
        if not rounds and index >= ROUNDS[0] and time.perf_counter() - start > seconds:
            break
        for entry in entries:
            for kind, graph in entry.graphs.items():
                entry.samples.setdefault(kind, []).append(graph.milliseconds())
            calls = entry.samples.setdefault("call", [])
            if sum(calls) < SLOW_MS or len(calls) < ROUNDS[0]:
                run = functools.partial(runs[entry.name], *given[entry.name][0])
                calls.append(statistics.median(common.milliseconds(run, device) for _ in range(3)))


def fastest(entries: Sequence[Entry], names: Sequence[str], kind: str) -> float | None:
    """The shortest median among the entries of these names."""
    found = [time for entry in entries if entry.name in names and (time := entry.median(kind)) is not None]
    return min(found, default=None)
