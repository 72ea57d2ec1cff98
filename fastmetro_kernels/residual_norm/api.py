"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastmetro_kernels.backends import BackendUnavailable, assumed_constant
from fastmetro_kernels.fused.inference import DTYPES, check_config, check_epsilon, check_tensor, choose_backend
from fastmetro_kernels.residual_norm import ops, reference
from fastmetro_kernels.residual_norm.plan import WIDEST, ResidualNormConfig, problem
from fastmetro_kernels.seeds import check_probability, seed_tensor


def residual_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
    config: ResidualNormConfig | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A residual sum in training with the dropout of its branch, and the layer norm (Ba, Kiros and Hinton 2016) of it::

        new_stream = stream + dropout(branch + branch_bias)
        normed = (new_stream - mean) / sqrt(variance + epsilon) * weight + bias

    with the mean and the variance of each row of the new stream as it is returned. Computed in float32 (float64 for
    float64 tensors); each result is rounded once. A number of the branch is dropped with the probability dropout_p
    rounded to a multiple of 1/65536 (at most 65535 of them), and multiplied by 1 / (1 - p) of the rounded one
    otherwise. Random numbers are those of Philox4x32-10 (Salmon et al. 2011), a call for eight of them
    (:mod:`fastmetro_kernels.dropout.random`); the backward pass makes them again, so that no mask is kept. Kept are the
    new stream, and of each row the mean and one over the deviation. Gradients of weight, bias and branch_bias are
    summed in a fixed order, the last of what is not rounded yet: equal calls give equal bits. Derivatives of the first
    order only. Autocast changes nothing.

    Args:
        stream: ``[..., C]``; float32, float16, bfloat16 or (reference) float64. ``[1, ..., C]`` for a branch
            ``[B, ..., C]`` is that of all samples. Copied first unless it is contiguous.
        branch: ``[..., C]``, of any of these dtypes; or None: the norm of the stream alone, and nothing is dropped.
        weight, bias: ``[C]``, float32 (float64 where stream or branch is).
        branch_bias: as weight; that of the linear layer that makes the branch, which then needs no sum of its own for
            its gradient. None: nothing is added.
        dropout_p: in [0, 1).
        seed: an integer of 64 bits, an int64 tensor of one element on the device of stream, or None to draw one from
            PyTorch's generator. The same seed drops the same numbers on every backend.
        epsilon: finite, at least 0.
        dtype: of normed; that of new_stream by default.
        config: the tile of the Triton kernels, of both passes, instead of the pinned ones, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU and C is at most 16,384), ``"triton"`` or ``"reference"``.

    Returns:
        new_stream, in the dtype to which those of stream and branch are promoted (stream itself without a branch), and
        normed; contiguous, in the shape of branch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; a branch_bias without a branch; an unknown backend.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    options = (dropout_p, seed, epsilon, dtype, config, backend)
    return cast("tuple[Tensor, Tensor]", _run(stream, branch, weight, bias, branch_bias, *options, both=True))


def final_residual_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
    config: ResidualNormConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`residual_norm` where nothing takes the new stream, as behind the last layer: normed alone.

    ``torch.compile`` would make zeros of a gradient of the new stream that there is not.
    """
    options = (dropout_p, seed, epsilon, dtype, config, backend)
    return cast(Tensor, _run(stream, branch, weight, bias, branch_bias, *options, both=False))


def _run(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None, dropout_p: float,
    seed: int | Tensor | None, epsilon: float, dtype: torch.dtype | None, config: ResidualNormConfig | None,
    backend: str, *, both: bool,
) -> Any:  # fmt: skip
    promoted = _check(stream, branch, weight, bias, branch_bias)
    check_probability("dropout_p", dropout_p)
    check_epsilon("epsilon", epsilon)
    if dtype is None:
        dtype = promoted
    elif dtype not in DTYPES:
        raise TypeError(f"dtype must be a floating point dtype or None, got {dtype!r}")
    check_config(config, ResidualNormConfig, problem)
    drawn = seed_tensor(seed, dropout_p if branch is not None else 0.0, stream.device)
    wide = torch.float64 if dtype == torch.float64 else promoted
    chosen = _choose(backend, stream.device, wide)
    if chosen == "triton" and stream.shape[-1] > WIDEST:
        if backend == "triton":
            raise BackendUnavailable(f"residual_norm: triton: rows of at most {WIDEST}, got {stream.shape[-1]}")
        chosen = "reference"
    if chosen == "reference":
        results = reference.forward(stream, branch, weight, bias, branch_bias, drawn, dropout_p, epsilon, dtype)
        return results if both else results[1]
    stream = stream.contiguous()
    rest = (None if one is None else one.contiguous() for one in (branch, weight, bias, branch_bias))
    options = (drawn, dropout_p, epsilon, dtype, both and branch is not None, config or ())
    found = _ResidualNorm.apply(stream, *rest, *options)
    return (stream, found) if both and branch is None else found


@assumed_constant
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("residual_norm", backend, device, dtype)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
        seed: Tensor | None, dropout_p: float, epsilon: float, dtype: torch.dtype, both: bool, config: Sequence[int],
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        new_stream, normed, mean, inverse = ops.residual_norm_triton(
            stream, branch, weight, bias, branch_bias, seed, dropout_p, epsilon, dtype, config
        )
        ctx.save_for_backward(stream if branch is None else new_stream, weight, mean, inverse, seed)
        ctx.options = dropout_p, both, config
        ctx.dtypes = stream.dtype, None if branch is None else branch.dtype
        ctx.shared = branch is not None and stream.shape != branch.shape
        ctx.set_materialize_grads(False)
        return (new_stream, normed) if both else normed

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, seed = ctx.saved_tensors
        dropout_p, both, config = ctx.options
        found = [None if one is None else one.contiguous() for one in given]
        more, grad = (found[0], found[1]) if both else (None, found[0])
        if more is None and grad is None:
            return (None,) * 11
        stream_dtype, branch_dtype = ctx.dtypes
        if ctx.shared:  # its sum is taken below, of what is not rounded before
            stream_dtype = x.dtype
        if not ctx.needs_input_grad[1]:
            branch_dtype = None
        grad_stream, grad_branch, grad_weight, grad_bias, grad_branch_bias = ops.residual_norm_backward_triton(
            grad, more, x, weight, mean, inverse, seed, dropout_p, stream_dtype, branch_dtype, ctx.needs_input_grad[4],
            config,
        )  # fmt: skip
        if not ops.writes_branch(seed, stream_dtype, branch_dtype):
            grad_branch = grad_stream
        if ctx.shared and ctx.needs_input_grad[0]:
            grad_stream = grad_stream.sum(0, keepdim=True).to(ctx.dtypes[0])
        asked = [ctx.needs_input_grad[place] for place in range(5)]
        of_norm = (grad_weight, grad_bias) if grad is not None else (None, None)
        gradients = (grad_stream, grad_branch, *of_norm, grad_branch_bias)
        return *(one if wanted else None for one, wanted in zip(gradients, asked, strict=True)), *[None] * 6


def _check(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None
) -> torch.dtype:
    """The dtype of the new stream."""
    check_tensor("stream", stream, DTYPES)
    if stream.dim() < 1 or stream.shape[-1] < 1:
        raise ValueError(f"stream must be [..., C] with C >= 1, got {list(stream.shape)}")
    promoted = stream.dtype
    if branch is not None:
        check_tensor("branch", branch, DTYPES, stream.device)
        promoted = torch.promote_types(stream.dtype, branch.dtype)
        if stream.shape != branch.shape:
            one_of_it = stream.dim() == branch.dim() >= 2 and stream.shape[0] == 1
            if not (one_of_it and stream.shape[1:] == branch.shape[1:]):
                raise ValueError(
                    f"stream must be {list(branch.shape)} like branch, or {[1, *branch.shape[1:]]} for all samples, "
                    f"got {list(stream.shape)}"
                )
    wide = torch.promote_types(promoted, torch.float32)
    if branch is None and branch_bias is not None:
        raise ValueError("branch_bias must be None without a branch")
    vectors = {"weight": weight, "bias": bias} | ({"branch_bias": branch_bias} if branch_bias is not None else {})
    for name, vector in vectors.items():
        check_tensor(name, vector, (wide,), stream.device)
        if vector.shape != stream.shape[-1:]:
            raise ValueError(f"{name} must be [{stream.shape[-1]}], got {list(vector.shape)}")
    return promoted
