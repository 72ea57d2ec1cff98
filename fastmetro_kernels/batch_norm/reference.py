"""The reference backend of the batch norm in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``batch_norm``. In float32 (float64 for float64 x), rounded once; autograd differentiates it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0, keepdim=True)
    y = (wide - mean) * torch.rsqrt(variance + epsilon) * weight[:, None, None] + bias[:, None, None]
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    y = y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return y, mean.detach().flatten(), variance.detach().flatten()
