"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.batch_norm import joint_ops, ops, reference
from fastmetro_kernels.batch_norm.plan import CHANNELS, BatchNormConfig, problem
from fastmetro_kernels.fused.inference import DTYPES, check_config, check_epsilon, check_tensor, choose_backend

_Running = tuple[Tensor | None, Tensor | None, Tensor | None, float]
_NOWHERE: _Running = (None, None, None, 0.0)


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


class ResidualNorm(NamedTuple):
    """A batch norm of its own for the residual.

    Attributes:
        weight, bias: ``[C]``, float32 (float64 for float64 x).
        running: averages over batches that this one's moments go into, in place; or None.
        epsilon: finite, at least 0.
    """

    weight: Tensor
    bias: Tensor
    running: RunningMoments | None = None
    epsilon: float = 1e-5


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: ResidualNorm | None = None,
    relu: bool = False,
    running: RunningMoments | None = None,
    epsilon: float = 1e-5,
    counters: Tensor | None = None,
    config: BatchNormConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """Batch norm in training (Ioffe and Szegedy 2015, algorithm 1) and what stands behind it in a residual network::

        out = relu((x - mean) / sqrt(variance + epsilon) * weight + bias + residual)

    with the mean and the variance of each channel over the batch and all positions. Moments and gradients are summed
    in float32 (float64 for float64 x) in a fixed order: equal calls give equal bits. Each pass reads its tensors twice,
    once for the sums, and writes what it returns; nothing else is kept but x and, where there are both a ReLU and a
    residual, a bit for each number. Derivatives of the first order only. Autocast changes nothing.

    A residual may have a batch norm of its own, as behind the convolution of a block's shortcut; what is added is then
    that norm of it, which is written nowhere, and its gradients come with the others.

    Args:
        x: ``[B, C, H, W]``; float32, float16, bfloat16 or (reference) float64. Other memory formats than
            channels_last are copied first.
        weight, bias: ``[C]``, float32 (float64 for float64 x).
        residual: like x.
        residual_norm: the residual's batch norm.
        relu: whether a ReLU follows.
        running: averages over batches that this one goes into, in place.
        epsilon: finite, at least 0.
        counters: int32, zeros, one for each 64 channels, contiguous; of one call, or of its gradients, at a time, which
            leave zeros. Made anew where absent, which is a launch.
        config: the tile of the Triton kernels instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        out, in the dtype of x and channels_last.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit, fewer than two values per channel; an unknown backend.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    options = (residual, residual_norm, relu, running, epsilon, counters, config, backend)
    return cast(Tensor, _run(x, weight, bias, *options, twice=False))


def batch_norm_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: ResidualNorm | None = None,
    relu: bool = False,
    running: RunningMoments | None = None,
    epsilon: float = 1e-5,
    counters: Tensor | None = None,
    config: BatchNormConfig | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm` for two that take its result, as a block of a residual network and its shortcut do.

    Returns:
        The result two times, on the same memory. The gradients of both are added on the way, without a kernel and a
        tensor for their sum.
    """
    options = (residual, residual_norm, relu, running, epsilon, counters, config, backend)
    return cast("tuple[Tensor, Tensor]", _run(x, weight, bias, *options, twice=True))


def make_counters(channels: int, device: torch.device | str) -> Tensor:
    """Counters for :func:`batch_norm` of so many channels."""
    return torch.zeros(-(-channels // CHANNELS), dtype=torch.int32, device=device)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, second: ResidualNorm | None, relu: bool,
    running: RunningMoments | None, epsilon: float, counters: Tensor | None, config: BatchNormConfig | None,
    backend: str, *, twice: bool,
) -> Any:  # fmt: skip
    _check(x, residual)
    _check_norm(x, weight, bias, running, epsilon)
    _check_residual_norm(x, residual, second)
    _check_counters(x, counters)
    check_config(config, BatchNormConfig, problem)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    into: _Running = running or _NOWHERE
    if _choose(backend, x.device, x.dtype) == "reference":
        if residual is not None and second is not None:
            others: _Running = second.running or _NOWHERE
            residual = reference.normalize(residual, second.weight, second.bias, *others, second.epsilon)[0]
        out = reference.forward(x, residual, weight, bias, *into, epsilon, relu)[0]
        return (out, out.view_as(out)) if twice else out
    vectors = [weight, bias] if second is None else [weight, bias, second.weight, second.bias]
    tensors = (x, residual, *(vector.contiguous() for vector in vectors))
    differentiated = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
    options = (relu, differentiated and relu and residual is not None, twice, config or ())
    if second is None:
        return _BatchNorm.apply(*tensors, *into, counters, epsilon, *options)
    others = second.running or _NOWHERE
    return _JointNorm.apply(*tensors, *into, *others, counters, epsilon, second.epsilon, *options)


@assumed_constant
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("batch_norm", backend, device, dtype)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
        running_var: Tensor | None, batches: Tensor | None, momentum: float, counters: Tensor | None, epsilon: float,
        relu: bool, bits: bool, twice: bool, config: Sequence[int],
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        running = running_mean, running_var, batches, counters, momentum
        options = (epsilon, relu, bits, config)
        out, mean, variance, let = ops.batch_norm_triton(x, residual, weight, bias, *running, *options)
        ctx.save_for_backward(x, weight, bias, mean, variance, let if bits else None)
        ctx.counters, ctx.options, ctx.residual = counters, (epsilon, relu, config), residual is not None
        ctx.set_materialize_grads(False)
        return (out, out.detach()) if twice else out

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, bits = ctx.saved_tensors
        epsilon, relu, config = ctx.options
        found = _gradients(given, x)
        if found is None:
            return (None,) * 14
        grad, more = found
        asked = ctx.residual and ctx.needs_input_grad[1]
        # With a ReLU the second kernel reads it, whether or not the residual asks for a gradient.
        behind = ctx.residual and (relu or (asked and more is not None))
        grad_x, grad_weight, grad_bias, before = ops.batch_norm_backward_triton(
            grad, more, x, bits, weight, bias, mean, variance, ctx.counters, epsilon, relu, behind, config
        )
        through = (before if behind else grad) if asked else None
        return grad_x, through, grad_weight, grad_bias, *[None] * 10


class _JointNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, residual_weight: Tensor,
        residual_bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
        momentum: float, residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
        residual_batches: Tensor | None, residual_momentum: float, counters: Tensor | None, epsilon: float,
        residual_epsilon: float, relu: bool, bits: bool, twice: bool, config: Sequence[int],
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        own = running_mean, running_var, batches, momentum
        others = residual_running_mean, residual_running_var, residual_batches, residual_momentum
        out, mean, variance, residual_mean, residual_variance, let = joint_ops.batch_norm_joint_triton(
            x, residual, weight, bias, residual_weight, residual_bias, *own, *others, counters, epsilon,
            residual_epsilon, relu, bits, config,
        )  # fmt: skip
        vectors = weight, mean, variance, residual_weight, residual_mean, residual_variance
        ctx.save_for_backward(x, residual, let if bits else None, *vectors)
        ctx.counters, ctx.options = counters, (epsilon, residual_epsilon, config)
        ctx.set_materialize_grads(False)
        return (out, out.detach()) if twice else out

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _gradients(given, ctx.saved_tensors[0])
        if found is None:
            return (None,) * 21
        gradients = joint_ops.batch_norm_joint_backward_triton(*found, *ctx.saved_tensors, ctx.counters, *ctx.options)
        return *gradients, *[None] * 15


def _gradients(given: Sequence[Tensor | None], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Those that came, of one or two takers, as the kernels read them."""
    found = [one.to(x.dtype).contiguous(memory_format=torch.channels_last) for one in given if one is not None]
    if not found:
        return None
    return found[0], found[1] if len(found) > 1 else None


def _check(x: Tensor, residual: Tensor | None) -> None:
    check_tensor("x", x, DTYPES)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x must have at least two values per channel, got {list(x.shape)}")
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual must be {list(x.shape)} like x, got {list(residual.shape)}")


def _check_residual_norm(x: Tensor, residual: Tensor | None, norm: ResidualNorm | None) -> None:
    if norm is not None:
        if not isinstance(norm, ResidualNorm):
            raise TypeError(f"residual_norm must be ResidualNorm, got {type(norm).__name__}")
        if residual is None:
            raise ValueError("residual_norm is there, but no residual")
        _check_norm(x, *norm, of="residual_norm.")


def _check_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: RunningMoments | None, epsilon: float, of: str = ""
) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    vectors = {f"{of}weight": weight, f"{of}bias": bias}
    if running is not None:
        if not isinstance(running, RunningMoments):
            raise TypeError(f"{of}running must be RunningMoments, got {type(running).__name__}")
        vectors |= {f"{of}running.mean": running.mean, f"{of}running.variance": running.variance}
        if not abs(running.momentum) < math.inf:  # not `isfinite`, which tracing does not know of a symbol
            raise ValueError(f"{of}running.momentum must be finite, got {running.momentum!r}")
        if running.batches is not None:
            check_tensor(f"{of}running.batches", running.batches, (torch.int64,), x.device)
            if running.batches.numel() != 1:
                raise ValueError(f"{of}running.batches must be one number, got {list(running.batches.shape)}")
    for name, vector in vectors.items():
        check_tensor(name, vector, (wide,), x.device)
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}], got {list(vector.shape)}")
        if "running" in name and not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    check_epsilon(f"{of}epsilon", epsilon)


def _check_counters(x: Tensor, counters: Tensor | None) -> None:
    if counters is not None:
        check_tensor("counters", counters, (torch.int32,), x.device)
        least = -(-x.shape[1] // CHANNELS)
        if counters.numel() < least or not counters.is_contiguous():
            raise ValueError(f"counters must be at least {least} numbers, contiguous, got {list(counters.shape)}")
