"""Times of all contenders on one case, in CUDA graphs of many calls, each checked against float64 before it is timed.

In the engine x has just been written, so it is in L2, while the weights of all layers and of the backbone are more than
L2 holds. So here: weights rotate over so many sets that they come from memory (as far as `MAX_SETS` reach), activations
over `ACTIVATION_SETS`. Contenders take turns, so that drifting clocks hit all alike.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import common
from bench.fused.basis import COMPILED, LIBRARY, Run
from bench.fused.cases import Case

MAX_SETS, ACTIVATION_SETS = 64, 4
GRAPH_SECONDS = 0.5e-3  # about so long a graph, so that its ends do not count
GRAPH_CALLS = (4, 128)
ROUNDS = (5, 40)


@dataclass
class Entry:
    """One contender: its largest error, and milliseconds per round, or why there are none."""

    name: str
    error: float | None = None
    note: str = ""
    wrong: bool = False
    graph: common.Graph | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def microseconds(self) -> float | None:
        """Median of the rounds."""
        return 1e3 * statistics.median(self.samples) if self.samples else None


def contenders(case: Case, compiled: bool, every_tile: bool) -> dict[str, Run]:
    """By name: the library, compiled if asked for, ours, and ours with every tile if asked for."""
    found: dict[str, Run] = {LIBRARY: case.plain}
    if compiled:
        found[COMPILED] = torch.compile(case.plain, mode="max-autotune-no-cudagraphs", dynamic=False)
    found |= case.ours()
    return found | case.tiles() if every_tile else found


def precompile(cases: Sequence[Case], every_tile: bool, device: torch.device) -> tuple[int, float]:
    """Runs every contender of ours once in parallel threads; calls and seconds. What fails here fails again later."""
    generator = torch.Generator(device).manual_seed(0)
    jobs: list[Callable[[], Tensor]] = []
    for case in cases:
        tensors = (*case.activations(generator), *case.constants(generator))
        runs = contenders(case, False, every_tile)
        jobs += [functools.partial(run, *tensors) for name, run in runs.items() if name != LIBRARY]
    return common.precompile(jobs, device)


def measure(case: Case, runs: dict[str, Run], device: torch.device, seconds: float) -> list[Entry]:
    """Entries of all contenders; those that could not run, or were wrong, carry a note instead of times."""
    sets = input_sets(case, device)
    entries = [Entry(name) for name in runs]
    limit = None
    with torch.no_grad():
        for entry in entries:
            try:
                limit = _check(case, entry, runs[entry.name], sets[0], limit)
                if not entry.wrong:
                    _capture(case, entry, runs[entry.name], sets, limit)
            except Exception as problem:  # out of shared memory, say: a note in the table, and the others go on
                entry.graph = None
                entry.note = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        start = time.perf_counter()
        for index in range(ROUNDS[1]):
            if index >= ROUNDS[0] and time.perf_counter() - start > seconds:
                break
            for entry in entries:
                if entry.graph is not None:
                    entry.samples.append(entry.graph.milliseconds())
    for entry in entries:
        entry.graph = None
    return entries


def input_sets(case: Case, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Inputs of the calls of a graph, one after the other."""
    generator = torch.Generator(device).manual_seed(0)
    constants = [case.constants(generator)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in constants[0])
    if size:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        constants += [case.constants(generator) for _ in range(min(MAX_SETS, max(2, 2 * l2 // size)) - 1)]
    activations = [case.activations(generator) for _ in range(ACTIVATION_SETS)]
    pairs = zip(range(max(len(constants), ACTIVATION_SETS)), itertools.cycle(activations), itertools.cycle(constants))
    return [(*activation, *constant) for _, activation, constant in pairs]


def _error(case: Case, got: Tensor, tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Largest error of the first and the last sample, and the largest number among them."""
    ends = sorted({0, case.batch - 1})
    activations, constants = tensors[: case.activation_count], tensors[case.activation_count :]
    exact = case.plain(*(tensor[ends].double() for tensor in activations), *(tensor.double() for tensor in constants))
    return (got[ends].double() - exact).abs().max().item(), exact.abs().max().item()


def _check(case: Case, entry: Entry, run: Run, tensors: tuple[Tensor, ...], limit: float | None) -> float:
    """Sets the error, and `wrong`; the limit is twice the error of the library, which comes first, and a rounding."""
    ours = entry.name not in (LIBRARY, COMPILED)
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(ours)  # fills fresh memory with NaN, which else may hold the library's result
    try:
        got = run(*tensors)
    finally:
        torch.use_deterministic_algorithms(previous)
    entry.error, largest = _error(case, got, tensors)
    if limit is None:
        limit = 2 * entry.error + torch.finfo(case.dtype).eps * largest
    entry.wrong = not entry.error <= limit  # NaN is wrong, too
    entry.note = f"error {entry.error:.2g}, {limit:.2g} allowed" if entry.wrong else ""
    return limit


def _capture(case: Case, entry: Entry, run: Run, sets: list[tuple[Tensor, ...]], limit: float) -> None:
    """A graph of calls on rotating sets; what its last call computes is checked, too."""
    expected = 2 * case.floor() + 2e-6
    calls = int(min(max(GRAPH_SECONDS / expected, GRAPH_CALLS[0]), GRAPH_CALLS[1]))
    chosen = [sets[index % len(sets)] for index in range(calls)]
    graph = common.capture([functools.partial(run, *one) for one in chosen], keep=ACTIVATION_SETS)
    graph.milliseconds()
    error, _ = _error(case, graph.last, chosen[-1])
    if error <= 2 * limit:  # which was made for other numbers of the same kind
        entry.graph = graph
    else:
        entry.wrong, entry.note = True, f"error {error:.2g} in a CUDA graph, {2 * limit:.2g} allowed"
