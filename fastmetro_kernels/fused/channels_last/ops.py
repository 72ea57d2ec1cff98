"""Schema and shape rules of the change of order; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "fastmetro_kernels"
MAX_CHANNELS = 16

torch.library.define(
    f"{NAMESPACE}::to_channels_last_triton",
    "(Tensor x, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(x: Tensor, dtype: torch.dtype) -> None:
    """Shape and dtype rules of the op, in a form that tracing understands."""
    torch._check(x.dim() == 4, lambda: f"x must be [B, C, H, W], got {tuple(x.shape)}")
    torch._check(x.is_contiguous(), lambda: "x must be contiguous")
    torch._check(1 <= x.size(1) <= MAX_CHANNELS, lambda: f"x must have 1 to {MAX_CHANNELS} channels, got {x.size(1)}")
    torch._check(torch.float64 not in (x.dtype, dtype), lambda: "to_channels_last_triton does not take float64")


@torch.library.register_fake(f"{NAMESPACE}::to_channels_last_triton")
def _fake(x: Tensor, dtype: torch.dtype) -> Tensor:
    check_arguments(x, dtype)
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=dtype)


def _to_channels_last_triton(x: Tensor, dtype: torch.dtype) -> Tensor:
    from fastmetro_kernels.fused.channels_last import triton

    return triton.to_channels_last(x, dtype)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::to_channels_last_triton", _device, _to_channels_last_triton)

to_channels_last_triton = torch.ops.fastmetro_kernels.to_channels_last_triton.default
