"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.batch_norm import ops, reference
from fastmetro_kernels.batch_norm.plan import BatchNormConfig, problem
from fastmetro_kernels.fused.inference import DTYPES, check_config, check_epsilon, check_tensor, choose_backend

_Running = tuple[Tensor | None, Tensor | None, Tensor | None, float]


class RunningMoments(NamedTuple):
    """Averages over batches, as of ``torch.nn.BatchNorm2d``: each batch's moment gets the share `momentum`.

    Attributes:
        mean, variance: ``[C]``, contiguous, float32 (float64 for float64 x); the variance is unbiased.
        batches: int64, one number, which is counted up; or None.
        momentum: finite.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor | None = None
    momentum: float = 0.1


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    running: RunningMoments | None = None,
    epsilon: float = 1e-5,
    config: BatchNormConfig | None = None,
    backend: str = "auto",
) -> Tensor:
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
        running: averages over batches that this one goes into, in place.
        epsilon: finite, at least 0.
        config: the tile of the Triton kernels instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        out, in the dtype of x and channels_last.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit, fewer than two values per channel; an unknown backend.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    _check(x, weight, bias, residual, running, epsilon)
    check_config(config, BatchNormConfig, problem)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    into: _Running = (None, None, None, 0.0) if running is None else running
    if _choose(backend, x.device, x.dtype) == "reference":
        return reference.forward(x, residual, weight, bias, *into, epsilon, relu)[0]
    return _BatchNorm.apply(x, residual, weight.contiguous(), bias.contiguous(), *into, epsilon, relu, config or ())


@assumed_constant
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("batch_norm", backend, device, dtype)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
        running_var: Tensor | None, batches: Tensor | None, momentum: float, epsilon: float, relu: bool,
        config: Sequence[int],
    ) -> Tensor:  # fmt: skip
        running = running_mean, running_var, batches, momentum
        out, mean, variance = ops.batch_norm_triton(x, residual, weight, bias, *running, epsilon, relu, config)
        ctx.save_for_backward(x, weight, bias, mean, variance, out if relu and residual is not None else None)
        ctx.epsilon, ctx.relu, ctx.residual, ctx.config = epsilon, relu, residual is not None, config
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, out = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        asked = ctx.residual and ctx.relu and ctx.needs_input_grad[1]
        grad_x, grad_weight, grad_bias, behind = ops.batch_norm_backward_triton(
            grad, x, out, weight, bias, mean, variance, ctx.epsilon, ctx.relu, asked, ctx.config
        )
        grad_residual = behind if asked else grad if ctx.residual and ctx.needs_input_grad[1] else None
        return grad_x, grad_residual, grad_weight, grad_bias, *[None] * 7


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, running: RunningMoments | None, epsilon: float
) -> None:
    check_tensor("x", x, DTYPES)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x must have at least two values per channel, got {list(x.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    vectors = {"weight": weight, "bias": bias}
    if running is not None:
        if not isinstance(running, RunningMoments):
            raise TypeError(f"running must be RunningMoments, got {type(running).__name__}")
        vectors |= {"running.mean": running.mean, "running.variance": running.variance}
        if not math.isfinite(running.momentum):
            raise ValueError(f"running.momentum must be finite, got {running.momentum!r}")
        if running.batches is not None:
            check_tensor("running.batches", running.batches, (torch.int64,), x.device)
            if running.batches.numel() != 1:
                raise ValueError(f"running.batches must be one number, got {list(running.batches.shape)}")
    for name, vector in vectors.items():
        check_tensor(name, vector, (wide,), x.device)
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}], got {list(vector.shape)}")
        if name.startswith("running") and not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual must be {list(x.shape)} like x, got {list(residual.shape)}")
    check_epsilon("epsilon", epsilon)
