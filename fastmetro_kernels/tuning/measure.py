"""Times the candidates of one pass of one case in turn, inside CUDA graphs, after holding each against float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro_kernels.attention.configs import padded_dim
from fastmetro_kernels.attention.dispatch import backend_reasons, module
from fastmetro_kernels.tuning import candidates
from fastmetro_kernels.tuning.cases import HEADS, Case, Tensors
from fastmetro_kernels.tuning.table import Candidate, Configuration, Point, describe

GRAPH_MS = 0.5  # a graph takes at least about this long, so that its ends do not count
GRAPH_CALLS = 64
LAUNCH_MS = 0.3
ROUNDS = 9

Say = Callable[[str], None]


@dataclass(eq=False)
class Entry:
    """A candidate that is right: what it runs on set number `i`, and the milliseconds of the rounds."""

    backend: str
    configuration: Configuration
    run: Callable[[int], Any]
    graph: torch.cuda.CUDAGraph | None = None
    calls: int = 1
    samples: list[float] = field(default_factory=list)


def runner(case: Case, pass_name: str, backend: str, configuration: Configuration) -> Callable[[int], Tensors]:
    """A function that runs the pass on set number `i` and returns its results."""
    backend_module, options = module(backend), (case.topology, case.scale, 0.0, None, configuration)

    def forward(index: int) -> Tensors:
        q, k, v, _ = case.sets[index]
        return backend_module.forward(q, k, v, *options)

    def backward(index: int) -> Tensors:
        q, k, v, grad = case.sets[index]
        return backend_module.backward(grad, None, q, k, v, *case.saved[index], *options)

    return forward if pass_name == "forward" else backward


def sdpa(case: Case, with_backward: bool) -> Callable[[int], Tensors]:
    """Masked SDPA as it is fastest: tensors [B, H, L, D], the mask additive and made in advance."""
    seen = case.topology.mask()
    mask = torch.zeros(seen.shape, dtype=case.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    sets = [[tensor.transpose(1, 2).contiguous() for tensor in one] for one in case.sets]

    def run(index: int) -> Tensors:
        q, k, v, grad = sets[index]
        if not with_backward:
            return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask),)
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return torch.autograd.grad(out, (q, k, v), grad)

    return run


@torch.no_grad()
def measure(case: Case, pass_name: str, say: Say) -> Point:
    """The milliseconds of every candidate that can take the case and is right.

    Raises:
        RuntimeError: no candidate is left.
    """
    size, dim = case.dtype.itemsize, padded_dim(case.shape.dim)
    if pass_name == "backward":
        case.saved = case.saved or _saved(case)
    entries = _checked(case, pass_name, candidates.first_round(pass_name, size, dim), say)
    _time(case, entries, 3)
    more: list[tuple[str, Configuration]] = [
        ("triton", one) for one in candidates.second_round(_found(entries), pass_name, size, dim)
    ]
    entries += _checked(case, pass_name, more, say)
    if not entries:
        raise RuntimeError(f"{case.shape} {pass_name}: no candidate can take this case, or none is right")
    yardstick = _sdpa_entries(case, pass_name)
    _time(case, entries + yardstick, ROUNDS)
    found = _found(entries)
    if yardstick:
        times = [statistics.median(entry.samples) for entry in yardstick]
        taken = times[0] if len(times) == 1 else times[1] - times[0]  # forward and backward less the forward
        if taken > 0:
            found.append(Candidate("sdpa", None, round(taken, 6)))
    found.sort(key=lambda one: one.milliseconds)
    batch_heads, dtype = case.shape.batch * HEADS, str(case.dtype).removeprefix("torch.")
    return Point(pass_name, size, dim, case.shape.vertices, batch_heads, dtype, tuple(found))


def _saved(case: Case) -> list[Tensors]:
    """(out, lse) of every set, by the first backend whose forward is right."""
    q, k, v, _ = case.sets[0]
    reasons = backend_reasons(q, k, v, case.topology)
    for backend in ("triton", "native"):
        if not reasons[backend]:
            run = runner(case, "forward", backend, None if backend == "triton" else 0)
            if case.problem(run(0)[:1], case.exact[:1]) is None:
                return [run(index) for index in range(len(case.sets))]
    raise RuntimeError(f"{case.shape}: no backend computes the forward pass")


def _checked(case: Case, pass_name: str, tried: list[tuple[str, Configuration]], say: Say) -> list[Entry]:
    q, k, v, _ = case.sets[0]
    reasons = backend_reasons(q, k, v, case.topology)
    for name in dict.fromkeys(name for name, _ in tried):
        if reasons[name]:
            say(f"  {name} is left out: {'; '.join(reasons[name])}")
    entries = []
    for backend, configuration in tried:
        if reasons[backend]:
            continue
        run = runner(case, pass_name, backend, configuration)
        exact = case.exact[:1] if pass_name == "forward" else case.exact[2]
        try:
            results = run(0)
            wrong = case.problem(results[: len(exact)], exact)
            if wrong is None and pass_name == "forward" and not _close(case, results[1]):
                wrong = "log-sum-exp is off"
        except Exception as error:  # a configuration that does not fit the device must not end the measurement
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if wrong:
            say(f"  refused: {backend} {describe(configuration)}: {wrong}")
            continue
        entries.append(Entry(backend, configuration, run))
    return entries


def _close(case: Case, lse: Tensor) -> bool:
    return torch.allclose(lse[case.checked()].double(), case.exact[1], rtol=1e-4, atol=1e-3)


def _sdpa_entries(case: Case, pass_name: str) -> list[Entry]:
    tokens = case.topology.num_tokens
    if case.shape.batch * HEADS * tokens * tokens > candidates.LARGEST_SDPA:
        return []
    passes = (False,) if pass_name == "forward" else (False, True)
    return [Entry("sdpa", None, sdpa(case, with_backward)) for with_backward in passes]


def _found(entries: list[Entry]) -> list[Candidate]:
    return [Candidate(one.backend, one.configuration, round(statistics.median(one.samples), 6)) for one in entries]


def _time(case: Case, entries: list[Entry], rounds: int) -> None:
    """Adds samples, round by round in turn, so that drifting clocks and a busy machine hit all alike."""
    for entry in entries:
        if entry.graph is None:
            _capture(case, entry)
    for entry in entries:
        entry.samples.clear()
    for _ in range(rounds):
        for entry in entries:
            entry.samples.append(_replay(entry))


def _capture(case: Case, entry: Entry) -> None:
    count = len(case.sets)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(side):
        entry.run(0)
        start.record()
        entry.run(0)
        end.record()
    end.synchronize()
    torch.cuda.current_stream().wait_stream(side)
    taken = start.elapsed_time(end)  # of small kernels this is mostly the time to launch them
    wanted = GRAPH_CALLS if taken < LAUNCH_MS else max(4, round(GRAPH_MS / taken))
    entry.calls = count * max(1, wanted // count)
    entry.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(entry.graph):
        for call in range(entry.calls):
            entry.run(call % count)


def _replay(entry: Entry) -> float:
    """Milliseconds of a call. An untimed replay runs right before, so that the start of the graph is not counted."""
    assert entry.graph is not None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    entry.graph.replay()
    start.record()
    entry.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / entry.calls
