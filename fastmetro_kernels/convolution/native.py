"""What the native backend takes: half precision on CUDA devices of compute capability 9.0 (``csrc/convolution/``)."""

from __future__ import annotations

import torch

from fastmetro_kernels import backends

OPERATOR = "convolution_native"


def reasons(device: torch.device, dtype: torch.dtype = torch.float16) -> list[str]:
    """Why the extension cannot take inputs of this device and dtype; empty when it can."""
    if device.type != "cuda":
        return ["runs on CUDA devices only"]
    found = list(backends.native_reasons(OPERATOR, device))
    if not found and torch.cuda.get_device_capability(device) != (9, 0):
        found.append(f"needs compute capability 9.0, this device has {torch.cuda.get_device_capability(device)}")
    if dtype not in (torch.float16, torch.bfloat16):
        found.append(f"takes float16 and bfloat16, got {dtype}")
    return found
