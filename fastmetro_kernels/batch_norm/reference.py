"""The reference backend of the batch norm in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    batches: Tensor | None, momentum: float, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The norm alone, in float32 (float64 for float64 x), and the moments, which go into the running averages."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0, keepdim=True)
    y = (wide - mean) * torch.rsqrt(variance + epsilon) * weight[:, None, None] + bias[:, None, None]
    mean, variance = mean.detach().flatten(), variance.detach().flatten()
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (count / (count - 1)), momentum)
    if batches is not None:
        batches.add_(1)
    return y, mean, variance


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, epsilon: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``batch_norm``; a residual that has a norm comes normalized. Rounded once; autograd differentiates it."""
    y, mean, variance = normalize(x, weight, bias, running_mean, running_var, batches, momentum, epsilon)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last), mean, variance
