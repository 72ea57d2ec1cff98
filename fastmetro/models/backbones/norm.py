"""Batch norms with what stands behind them: as they are, or in training as one op of this project."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmetro_kernels.batch_norm import RunningMoments, batch_norm

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
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        running = RunningMoments(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)
        options: Any = {"residual": residual, "relu": relu, "running": running, "epsilon": norm.eps}
        return batch_norm(x, norm.weight, norm.bias, **options)
    y = norm(x)
    if residual is not None:
        y = y + residual
    return torch.relu_(y) if relu else y


def _ordinary(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None
