"""One stage of the benchmark: every contender on one case, forward or forward + backward.

First each contender is compiled and checked, variant by variant, and its fastest variant is captured into CUDA graphs,
with those that are `kept` although they are slower.
Then all of them are timed in turn, round by round, so that drifting clocks and a busy machine hit all alike; a ratio
is the median of the ratios of the rounds.

"warm" replays calls on one set of tensors. "cold" goes through so many sets, outputs included, that none of them can
still be in L2. Emptying L2 instead, by writing a large buffer between the calls and subtracting its time, was not
chosen: the difference of two large times is uncertain by more than a small kernel takes, and the kernel would pay for
writing the buffer's dirty lines back. The mesh's own lists and masks are shared by all sets, as they are by all layers
of a network, so they may stay in L2. "wall" is a single call from Python, waited for.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench import common
from bench.attention import checks
from bench.attention.cases import Case, Unavailable
from bench.attention.contenders import DENSE, OURS, Variant, variants

GRAPH_MS = 1.0  # a graph takes at least about this long, so that the ends do not count
GRAPH_CALLS = 256  # and holds no more calls than this
ROUNDS = (5, 30)
ROUNDS_SECONDS = 2.0
SETTLED_MS = 25.0  # replays longer than this need no untimed replay before them

Say = Callable[[str], None]


@dataclass(eq=False)
class Entry:
    """A contender's variant: whether it was timed, and if not why.

    Attributes:
        status: "ok", "slower" (than another variant in the trial), "skipped", "failed" or "wrong".
        samples: Milliseconds per round, by "warm", "cold" and "wall".
    """

    name: str
    variant: Variant | None
    status: str
    reason: str = ""
    errors: list[checks.Errors] = field(default_factory=list)
    trial_ms: float = 0.0
    graphs: dict[str, common.Graph] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    fastest_wall: float = 0.0

    def median(self, kind: str) -> float | None:
        """Median of the rounds in milliseconds, None if that was not timed."""
        values = self.samples.get(kind)
        return statistics.median(values) if values else None


class Budget:
    """Time for optional work: each of `stages` stages may use what its predecessors left of their equal shares."""

    def __init__(self, seconds: float, stages: int) -> None:
        self.seconds, self.stages, self.stage = seconds, stages, 0
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def spare(self) -> bool:
        """Whether something optional may be tried in the current stage."""
        return not self.seconds or self.elapsed() < self.seconds * (self.stage + 1) / self.stages


@dataclass(frozen=True)
class Stage:
    """A case and a pass, with what is needed to measure contenders on them."""

    case: Case
    backward: bool
    autotune: bool = False
    repeats: int = 0
    budget: Budget = field(default_factory=lambda: Budget(0, 1))
    say: Say = lambda text: None

    @property
    def counted(self) -> str:
        """The time that ratios are made of.

        On a GPU the time inside graphs: cold, but warm for a batch of 1 that fits into L2, where a network has just
        written it when it calls attention. On a CPU the wall time.
        """
        case = self.case
        if not case.on_gpu:
            return "wall"
        return "warm" if case.shape.batch == 1 and case.set_bytes <= case.l2 else "cold"

    def measure(self, names: list[str]) -> list[Entry]:
        """Checks and times the contenders; entries in the order of `names`, the fastest variant of each first."""
        entries: list[Entry] = []
        with torch.set_grad_enabled(self.backward):
            oracles = {True: self._oracle(masked=True)}
            if DENSE in names:
                oracles[False] = self._oracle(masked=False)
            for name in names:
                start = time.monotonic()
                found = self._prepare(name, oracles)
                entries += found
                self.say(f"  {name}: {found[0].status} after {time.monotonic() - start:.1f} s {found[0].reason}")
            del oracles
            self._time([entry for entry in entries if entry.status == "ok"])
        for entry in entries:
            entry.graphs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return entries

    def _oracle(self, masked: bool) -> checks.Oracle | Exception:
        """The float64 results; what prevents them fails the contenders that need them, not the stages to come."""
        try:
            return checks.oracle(self.case, self.backward, masked)
        except Exception as error:
            return error

    def _prepare(self, name: str, oracles: dict[bool, checks.Oracle | Exception]) -> list[Entry]:
        """All variants of a contender, the fastest right one first and ready to be timed."""
        entries: list[Entry] = []
        choices = variants(name, self.case, self.backward, self.autotune)
        while True:
            try:
                variant = next(choices, None)
            except Exception as error:
                entries.append(_problem(name, None, error))
                break
            if variant is None:
                break
            if variant.costly and not self.budget.spare():
                entries.append(Entry(name, variant, "skipped", "not tried: time budget"))
            else:
                entries.append(self._try(name, variant, oracles[variant.masked]))
        right = sorted((entry for entry in entries if entry.status == "ok"), key=lambda entry: entry.trial_ms)
        for entry in right:
            if entry is right[0] or (entry.variant and entry.variant.kept):
                self._capture(entry)
            else:
                entry.status = "slower"
                entry.reason = f"{entry.trial_ms:.4f} ms in the trial, the chosen variant {right[0].trial_ms:.4f} ms"
        return right + [entry for entry in entries if entry not in right]

    def _try(self, name: str, variant: Variant, truth: checks.Oracle | Exception) -> Entry:
        """Checks one variant and takes its time roughly."""
        if isinstance(truth, Exception):
            return _problem(name, variant, truth)
        try:
            found, problem = checks.check(variant, self.case, self.backward, truth)
            if problem:
                return Entry(name, variant, "wrong", problem, found)
            milliseconds, problem = self._trial(variant, truth)
            return Entry(name, variant, "wrong" if problem else "ok", problem or "", found, milliseconds)
        except Exception as error:
            return _problem(name, variant, error)

    def _trial(self, variant: Variant, truth: checks.Oracle) -> tuple[float, str | None]:
        """Milliseconds of a call, and what is wrong with the results of a graph (None: nothing)."""
        tensors = self.case.inputs(variant.layout, self.backward)[0]
        if not self.case.on_gpu:
            return common.milliseconds(lambda: variant.run(tensors), self.case.device), None
        graph = common.capture([lambda: variant.run(tensors)] * 4)
        if problem := checks.check_graph(graph, variant, self.case, truth):
            return 0.0, f"in a CUDA graph: {problem}"
        return min(graph.milliseconds() for _ in range(3)), None

    def _capture(self, entry: Entry) -> None:
        """Captures the graphs of an entry; what prevents it becomes its status."""
        if not self.case.on_gpu or entry.variant is None:
            return
        try:
            self._capture_variant(entry, entry.variant)
        except Exception as error:
            failed = _problem(entry.name, entry.variant, error)
            entry.status, entry.reason = failed.status, failed.reason

    def _capture_variant(self, entry: Entry, variant: Variant) -> None:
        """ "warm" (unless one set alone exceeds L2 by far) and "cold"."""
        run = variant.run
        sets = self.case.inputs(variant.layout, self.backward)
        wanted = max(2, min(GRAPH_CALLS, round(GRAPH_MS / entry.trial_ms)))
        if self.case.set_bytes < Case.L2_FACTOR * self.case.l2:
            entry.graphs["warm"] = common.capture([lambda: run(sets[0])] * wanted)
        calls = [functools.partial(run, one) for one in sets] * max(1, wanted // len(sets))
        entry.graphs["cold"] = common.capture(calls, keep=len(sets))

    def _time(self, entries: list[Entry]) -> None:
        rounds = self._rounds(entries)
        for _ in range(rounds):
            for entry in entries:
                self._round(entry)

    def _rounds(self, entries: list[Entry]) -> int:
        if self.repeats:
            return self.repeats
        if not self.case.on_gpu:
            large = self.case.topology.num_tokens > 4000
            return (3 if self.backward else 5) if large else 25
        graphs = [(graph.calls, entry.trial_ms) for entry in entries for graph in entry.graphs.values()]
        one = sum(2 * calls * trial for calls, trial in graphs) / 1e3
        return min(ROUNDS[1], max(ROUNDS[0], int(ROUNDS_SECONDS / max(one, 1e-9))))

    def _round(self, entry: Entry) -> None:
        """One replay of each graph, and some single calls."""
        variant, case = entry.variant, self.case
        if variant is None:
            return
        for kind, graph in entry.graphs.items():
            settle = graph.calls * entry.trial_ms < SETTLED_MS
            entry.samples.setdefault(kind, []).append(graph.milliseconds(settle))
        tensors = case.inputs(variant.layout, self.backward)[0]
        inner = 3 if entry.trial_ms < SETTLED_MS else 1
        if not case.on_gpu:  # the baselines take long there, and one call of them is enough
            inner = 5 if entry.name in OURS else 1
        times = [common.milliseconds(lambda: variant.run(tensors), case.device) for _ in range(inner)]
        entry.samples.setdefault("wall", []).append(statistics.median(times))
        entry.fastest_wall = min([entry.fastest_wall or times[0], *times])


def _problem(name: str, variant: Variant | None, error: Exception) -> Entry:
    """What cannot run here is skipped, anything else has failed."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, Unavailable):
        return Entry(name, variant, "skipped", lines[0])
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return Entry(name, variant, "skipped", "out of memory")
    return Entry(name, variant, "failed", f"{type(error).__name__}: {lines[0]}"[:300])


def ratios(entry: Entry, baseline: Entry | None, kind: str) -> list[float]:
    """Time of the baseline over the entry's, round by round; empty where one of them was not timed."""
    if baseline is None:
        return []
    return [b / a for a, b in zip(entry.samples.get(kind, []), baseline.samples.get(kind, []), strict=False)]
