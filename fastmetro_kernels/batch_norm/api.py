"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.batch_norm import ops, reference
from fastmetro_kernels.fused.inference import DTYPES, check_epsilon, check_tensor, choose_backend


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    epsilon: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training (Ioffe and Szegedy 2015, algorithm 1) and what stands behind it in a residual network::

        out = relu((x - mean) / sqrt(variance + epsilon) * weight + bias + residual)

    with the mean and the variance of each channel over the batch and all positions. Moments and gradients are summed
    in float32 (float64 for float64 x) in a fixed order: equal calls give equal bits. Each pass reads its tensors twice,
    once for the sums, and writes what it returns; nothing else is kept but x and, where there are both a ReLU and a
    residual, out. Derivatives of the first order only. Autocast changes nothing.

    Args:
        x: ``[B, C, H, W]``; float32, float16, bfloat16 or (reference) float64. Other memory formats than
            channels_last are copied first.
        weight, bias: ``[C]``, float32 (float64 for float64 x).
        residual: like x.
        relu: whether a ReLU follows.
        epsilon: finite, at least 0.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        out, in the dtype of x and channels_last; the mean and the (biased) variance, ``[C]`` in the dtype of weight,
        for running averages; they carry no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit, fewer than two values per channel; an unknown backend.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    _check(x, weight, bias, residual, epsilon)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if _choose(backend, x.device, x.dtype) == "reference":
        return reference.forward(x, residual, weight, bias, epsilon, relu)
    return _BatchNorm.apply(x, residual, weight.contiguous(), bias.contiguous(), epsilon, relu)


@assumed_constant
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("batch_norm", backend, device, dtype)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, variance = ops.batch_norm_triton(x, residual, weight, bias, epsilon, relu)
        ctx.save_for_backward(x, weight, bias, mean, variance, out if relu and residual is not None else None)
        ctx.epsilon, ctx.relu, ctx.residual = epsilon, relu, residual is not None
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, out = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        asked = ctx.residual and ctx.relu and ctx.needs_input_grad[1]
        grad_x, grad_weight, grad_bias, behind = ops.batch_norm_backward_triton(
            grad, x, out, weight, bias, mean, variance, ctx.epsilon, ctx.relu, asked
        )
        grad_residual = behind if asked else grad if ctx.residual and ctx.needs_input_grad[1] else None
        return grad_x, grad_residual, grad_weight, grad_bias, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, epsilon: float) -> None:
    check_tensor("x", x, DTYPES)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x must have at least two values per channel, got {list(x.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, vector in (("weight", weight), ("bias", bias)):
        check_tensor(name, vector, (wide,), x.device)
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}], got {list(vector.shape)}")
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual must be {list(x.shape)} like x, got {list(residual.shape)}")
    check_epsilon("epsilon", epsilon)
