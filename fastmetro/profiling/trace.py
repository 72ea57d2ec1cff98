"""Chrome traces of several contenders, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastmetro.files import replacing
from fastmetro.profiling.contenders import Contender
from fastmetro.profiling.latency import synchronize, tensor_float_32

_CALLS = 3


@torch.no_grad()
def write_trace(path: Path, contenders: Sequence[Contender], images: Tensor) -> None:
    """Write what CPU and GPU do in a few calls of each contender, under its name; the file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    activities = [ProfilerActivity.CPU]
    if images.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for contender in contenders:
            with tensor_float_32(contender.uses_tf32), record_function(f"{contender.name}, batch {len(images)}"):
                for _ in range(_CALLS):
                    contender.run(images)
                synchronize(images.device)
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
