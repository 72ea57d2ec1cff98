"""What the native backend takes: half precision on CUDA devices of compute capability 9.0 (``csrc/convolution/``)."""

from __future__ import annotations

import torch

from fastmetro_kernels import backends

OPERATOR = "convolution_native"


def reasons(device: torch.device, dtype: torch.dtype = torch.float16) -> list[str]:
    """Why the extension cannot take inputs of this device and dtype; empty when it can."""
    return backends.hopper_reasons(OPERATOR, device, dtype)
