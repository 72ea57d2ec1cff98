"""What a step's time is spent on: the kernels of a few steps by name, and by what they do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fastmetro.profiling.latency import synchronize

STEPS = 3
LONGEST = 60
"""Names that are told; what is left over is one entry."""
KINDS = (
    ("update", r"adam|multi_tensor|foreach|lpnorm"),
    ("batch norms", r"batch_?norm|bn_(fw|bw)"),
    ("convolutions", r"conv|cudnn|xmma_(fprop|dgrad|wgrad)|implicit|(fprop|dgrad|wgrad)"),
    ("attention", r"attention|flash|fmha|efficient|sdp"),
    ("products", r"gemm|gemv|nvjet|cutlass|cublas|splitk|linear|matmul|addmm|bmm"),
    ("upsampling", r"upsampl|fm_upsampling|spmm|csr"),
    ("copies and fills", r"memcpy|memset|copy|fill"),
    ("compiled, fused", r"^triton_"),
)
"""What a kernel does by a part of its name, the first that fits; Inductor's fused kernels tell no more than that."""
OTHER = "others"


class Spent(NamedTuple):
    """Calls and microseconds of a step."""

    calls: float
    microseconds: float


def kind_of(name: str) -> str:
    """What a kernel does, as far as its name tells."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def spent(run: Callable[[], object], device: torch.device) -> dict[str, Spent]:
    """Of the kernels of a step by name, the longest first; on a CPU of PyTorch's operations."""
    cuda = device.type == "cuda"
    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(STEPS):
            run()
        synchronize(device)
    found = {}
    for event in profiler.key_averages():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time > 0:
            found[event.key] = Spent(event.count / STEPS, time / STEPS)
    return dict(sorted(found.items(), key=lambda item: -item[1].microseconds))


def summary(found: Mapping[str, Spent]) -> dict[str, Any]:
    """Microseconds by kind, and the longest names."""
    kinds: Counter[str] = Counter()
    for name, one in found.items():
        kinds[kind_of(name)] += one.microseconds
    rows: list[Sequence[Any]] = [
        [name[:120], round(one.calls, 1), round(one.microseconds, 1)] for name, one in list(found.items())[:LONGEST]
    ]
    rest = list(found.values())[LONGEST:]
    if rest:
        left = [f"{len(rest)} more", round(sum(one.calls for one in rest), 1), round(sum(one[1] for one in rest), 1)]
        rows.append(left)
    return {
        "total_us": round(sum(one.microseconds for one in found.values()), 1),
        "by_kind_us": {kind: round(time, 1) for kind, time in kinds.most_common()},
        "kernels": rows,
    }
