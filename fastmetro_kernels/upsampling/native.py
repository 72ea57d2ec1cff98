"""What the native backend takes: C++ for CPU tensors, CUDA C++ for CUDA tensors (``csrc/upsampling/``)."""

from __future__ import annotations

import torch

from fastmetro_kernels import backends


def reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the extension cannot take an input of this device and dtype; empty when it can."""
    found = list(backends.native_reasons("upsample_native", device))
    if dtype == torch.float64 and device.type != "cpu":
        found.append("float64 runs on CPU tensors only")
    return found
