"""What a step's time is spent on: the kernels of a few steps by name, and by what they do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastmetro.profiling.latency import synchronize

STEPS = 3
LONGEST = 120
"""Names that are told; what is left over is one entry."""
KINDS = (
    ("update", r"adam|multi_tensor|foreach|lpnorm"),
    ("batch norms", r"batch_?norm|bn_(fw|bw)"),
    ("layer norms", r"layer_?norm|residual_norm|GammaBeta"),
    ("pooling", r"max_?pool"),
    ("attention", r"attention|flash|fmha|efficient|sdp|convert_dq|dot_do_o"),  # also cuDNN's
    ("dropout", r"(?<!native_)dropout"),
    ("convolutions", r"conv|cudnn|xmma_(fprop|dgrad|wgrad)|implicit|(fprop|dgrad|wgrad)"),
    ("products", r"gemm|gemv|nvjet|cutlass|cublas|splitk|linear|matmul|addmm|bmm"),
    ("upsampling", r"upsampl|fm_upsampling|spmm|csr"),
    ("copies and fills", r"^(?!triton_).*(memcpy|memset|copy|fill)"),
    ("compiled, fused", r"^triton_"),
)
"""What a kernel does by a part of its name, the first that fits; Inductor's fused kernels tell no more than that."""
OTHER = "others"


class Spent(NamedTuple):
    """Calls of a step, microseconds in which nothing that began before was still running, and those in front of it in
    which nothing ran at all.

    A kernel that is launched early, or on a second stream, runs beside another one: its own time begins when that ends.
    So the sum over all kernels is how long the device was busy. It waits in front of a kernel for what that depends on,
    or for the host; the first one of a profile has nothing in front.
    """

    calls: float
    microseconds: float
    waited: float = 0.0


def kind_of(name: str) -> str:
    """What a kernel does, as far as its name tells."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


class Run(NamedTuple):
    """A kernel or a copy, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def own_times(runs: Iterable[Run]) -> dict[str, Spent]:
    """By name, of all runs together."""
    calls: Counter[str] = Counter()
    times: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    ordered = sorted(runs, key=lambda one: (one.start, one.end))
    until = ordered[0].start if ordered else 0.0
    for name, start, end in ordered:
        calls[name] += 1
        waits[name] += max(start - until, 0.0)  # type: ignore[assignment]
        times[name] += max(end - max(start, until), 0.0)  # type: ignore[assignment]
        until = max(until, end)
    return {name: Spent(calls[name], times[name], waits[name]) for name in calls}


def spent(run: Callable[[], object], device: torch.device) -> dict[str, Spent]:
    """Of the kernels of a step by name, the longest first; on a CPU of PyTorch's operations."""
    cuda = device.type == "cuda"
    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(STEPS):
            run()
        synchronize(device)
    if cuda:
        events = [one for one in profiler.events() if one.device_type == DeviceType.CUDA and not one.is_user_annotation]
        found = own_times(Run(one.name, one.time_range.start, one.time_range.end) for one in events)
    else:
        found = {event.key: Spent(event.count, event.self_cpu_time_total) for event in profiler.key_averages()}
    each = {name: Spent(*(value / STEPS for value in one)) for name, one in found.items() if one.microseconds > 0}
    return dict(sorted(each.items(), key=lambda item: -item[1].microseconds))


def summary(found: Mapping[str, Spent]) -> dict[str, Any]:
    """Microseconds by kind, and the longest names: calls, microseconds, and microseconds waited in front of them."""
    kinds: Counter[str] = Counter()
    for name, one in found.items():
        kinds[kind_of(name)] += one.microseconds
    rows: list[Sequence[Any]] = [
        [name[:120], *(round(value, 1) for value in one)] for name, one in list(found.items())[:LONGEST]
    ]
    rest = list(found.values())[LONGEST:]
    if rest:
        rows.append([f"{len(rest)} more", *(round(sum(column), 1) for column in zip(*rest, strict=True))])
    return {
        "total_us": round(sum(one.microseconds for one in found.values()), 1),
        "waited_us": round(sum(one.waited for one in found.values()), 1),
        "by_kind_us": {kind: round(time, 1) for kind, time in kinds.most_common()},
        "kernels": rows,
    }
