"""Batch norm as part of the convolution in front of it, and how much work that saves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastmetro.inference.engine.report import Fold


def fold_batch_norm(convolution: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals a convolution and then a batch norm in evaluation.

    Args:
        convolution: weight [O, I, h, w], with or without a bias, any floating point type.
        norm: batch norm over its O channels, with running statistics.

    Returns:
        weight [O, I, h, w] and bias [O], both float64: rounding is left to whoever stores them, once.

    Raises:
        TypeError: ``norm`` is not a batch norm.
        ValueError: it keeps no running statistics, so that its output depends on the batch.
    """
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f"norm must be a batch norm, got {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm must keep running statistics (track_running_stats=True), got one that does not")
    with torch.no_grad():
        weight, bias = fuse_conv_bn_weights(
            convolution.weight.double(),
            _double(convolution.bias),
            norm.running_mean.double(),
            norm.running_var.double(),
            norm.eps,
            _double(norm.weight),
            _double(norm.bias),
        )
        return weight.detach(), bias.detach()


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def batch_norm_sizes(backbone: nn.Module, side: int = 224) -> dict[str, int]:
    """Output elements of every batch norm for one square image of ``side`` pixels, by module name.

    Only shapes are propagated (on the meta device): no memory, no arithmetic.
    """
    memo: dict[int, Tensor] = {}
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    shadow = copy.deepcopy(backbone, memo).eval()
    sizes: dict[str, int] = {}

    def watch(name: str, norm: nn.Module) -> None:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            sizes[name] = output.numel()

        norm.register_forward_hook(record)

    for name, module in shadow.named_modules():
        module._forward_hooks.clear()  # those of the copied backbone are for real images
        module._forward_pre_hooks.clear()
        if isinstance(module, _BatchNorm):
            watch(name, module)
    dtype = next(shadow.parameters()).dtype
    shadow(torch.empty(1, 3, side, side, dtype=dtype, device="meta"))
    return sizes


def batch_norm_fold(sizes: dict[str, int]) -> Fold:
    """What folding all batch norms saves: a multiplication and an addition per element of their outputs."""
    return Fold(
        "batch-norm",
        f"the scale and shift of {len(sizes)} batch norms are part of the convolutions in front of them",
        2 * sum(sizes.values()),
    )


def downsample_bias_fold(sizes: dict[str, int]) -> Fold:
    """What moving the bias of the downsample branches to the blocks' last convolutions saves: an addition each."""
    downsample = [size for name, size in sizes.items() if name.split(".")[-2:-1] == ["downsample"]]
    return Fold(
        "downsample-bias",
        f"{len(downsample)} residual blocks have one bias for their downsample branch and their last convolution",
        sum(downsample),
    )
