"""Batch norms with what stands behind them: as they are, or in training as one op of this project."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmetro_kernels.batch_norm import ResidualNorm, RunningMoments, batch_norm, batch_norm_twice, make_counters
from fastmetro_kernels.max_pool import max_pool, max_pool_twice

_FUSED = "fused_in_training"
_COUNTERS = "fused_in_training_counters"
_TWIN = "fastmetro_twin"


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


def norm_relu(
    norm: nn.BatchNorm2d,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: nn.BatchNorm2d | None = None,
    relu: bool = True,
    twin: bool = False,
) -> Tensor:
    """``relu(norm(x) + residual)`` of [B, C, H, W], without either if not asked; x may be overwritten.

    Args:
        residual_norm: what the residual goes through before it is added. Where both norms are fused, they are one op.
        twin: whether two will take the result; the second one calls :func:`twin_of` for it. Where the op is taken, it
            then adds their gradients.
    """
    if residual is not None and residual_norm is not None:
        joint = _taken(norm) and _taken(residual_norm) and residual.dtype == x.dtype
        if not joint:
            residual, residual_norm = norm_relu(residual_norm, residual, relu=False), None
    alike = residual is None or residual.dtype == x.dtype  # else PyTorch's operations promote one
    if _taken(norm) and alike:
        options: Any = {"residual": residual, "relu": relu, "running": _running(norm), "epsilon": norm.eps}
        if residual_norm is not None:
            averages = _running(residual_norm)
            second = ResidualNorm(residual_norm.weight, residual_norm.bias, averages, residual_norm.eps)
            options["residual_norm"] = second
        if torch.compiler.is_compiling():  # neither counters nor a twin, which are attributes
            return batch_norm(x, norm.weight, norm.bias, **options)
        options["counters"] = _counters(norm, x.device)
        if not twin:
            return batch_norm(x, norm.weight, norm.bias, **options)
        one, other = batch_norm_twice(x, norm.weight, norm.bias, **options)
        setattr(one, _TWIN, other)
        return one
    y = norm(x)
    if residual is not None:
        y = y + residual
    return torch.relu_(y) if relu else y


def pool(norm: nn.BatchNorm2d, layer: nn.MaxPool2d, x: Tensor) -> Tensor:
    """``layer(x)`` of what stands behind a norm: by the op where that is fused. Two may take it (:func:`twin_of`)."""
    if not (norm.training and getattr(norm, _FUSED, False) and _is_stem_pool(layer)):
        return cast(Tensor, layer(x))
    if torch.compiler.is_compiling():
        return max_pool(x)
    one, other = max_pool_twice(x)
    setattr(one, _TWIN, other)
    return one


def _is_stem_pool(layer: nn.MaxPool2d) -> bool:
    found = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    return found == (3, 2, 1, 1, False, False)


def twin_of(x: Tensor) -> Tensor:
    """The same values for a second taker: x itself, unless :func:`norm_relu` or :func:`pool` made two."""
    return cast(Tensor, getattr(x, _TWIN, x))


def _counters(norm: nn.BatchNorm2d, device: torch.device) -> Tensor | None:
    """The layer's own, so that calls need not make any; one layer works on one batch at a time."""
    found = cast("Tensor | None", getattr(norm, _COUNTERS, None))
    if found is None or found.device != device:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # what is made now is zero only once the graph has run
        found = make_counters(norm.num_features, device)
        setattr(norm, _COUNTERS, found)
    return found


def _running(norm: nn.BatchNorm2d) -> RunningMoments:
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    return RunningMoments(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)


def _taken(norm: nn.BatchNorm2d) -> bool:
    """Whether the op takes this norm: in training, where it is fused and ordinary."""
    if not (norm.training and getattr(norm, _FUSED, False)):  # first: a folded one is an nn.Identity
        return False
    return norm.affine and norm.track_running_stats and norm.momentum is not None
