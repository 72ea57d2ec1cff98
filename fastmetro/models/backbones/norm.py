"""Batch norms with what stands behind them: as they are, or in training as one op of this project."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmetro_kernels import batch_norm as kernels

_FUSED = "fused_in_training"


def fuse_batch_norms(module: nn.Module, fused: bool = True) -> int:
    """Let the batch norms of residual blocks and stems in a module take, while they train, the op that also adds the
    residual and has the ReLU and all gradients in two launches each; or, with ``fused`` false, PyTorch's operations.

    Parameters, buffers and their names stay; outputs are the same but for rounding. Copies of the module keep it.

    Returns:
        How many batch norms the module has.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        setattr(layer, _FUSED, fused)
    return len(norms)


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, *, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """``relu(norm(x) + residual)`` of [B, C, H, W], without either if not asked; x may be overwritten."""
    if norm.training and getattr(norm, _FUSED, False) and _ordinary(norm):
        y, mean, variance = kernels.batch_norm(
            x, norm.weight, norm.bias, residual=residual, relu=relu, epsilon=norm.eps
        )  # fmt: skip
        _update(norm, mean, variance, x.numel() // x.shape[1])
        return y
    y = norm(x)
    if residual is not None:
        y = y + residual
    return torch.relu_(y) if relu else y


def _ordinary(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running averages, of which that of the variance is unbiased, as PyTorch has them."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    norm.num_batches_tracked.add_(1)
