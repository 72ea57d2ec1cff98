"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.dropout import ops, reference
from fastmetro_kernels.dropout.random import GROUP
from fastmetro_kernels.fused.inference import DTYPES, check_tensor, choose_backend
from fastmetro_kernels.seeds import check_probability, seed_tensor


def relu_dropout(
    x: Tensor, p: float, *, bias: Tensor | None = None, seed: int | Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """``dropout(relu(x + bias))`` in training, for which the backward pass keeps nothing but the result.

    An element is dropped with the probability p rounded to a multiple of 1/65536 (at most 65535 of them), and
    multiplied by 1 / (1 - p) of the rounded one otherwise. Random numbers are those of Philox4x32-10 (Salmon et al.
    2011), a call for eight elements: :mod:`fastmetro_kernels.dropout.random`. The gradient is ``grad * (out > 0) / (1 -
    p)``, and that of the bias its sum over all rows in float32, before it is rounded, in a fixed order: equal calls
    give equal bits. Where C is no multiple of 8, of which random numbers are made at once, PyTorch adds the bias in
    float32 and sums its gradient. NaN stays NaN, and infinity becomes it where it is dropped, as in PyTorch.
    Derivatives of the first order only. Autocast changes nothing.

    Args:
        x: any shape; ``[..., C]`` with a bias. float32, float16, bfloat16 or (reference) float64. Copied first unless
            it is contiguous.
        p: in [0, 1).
        bias: ``[C]``, float32 (float64 for float64 x), that of the linear layer that makes x, which then needs no sum
            of its own for its gradient. None: nothing is added.
        seed: an integer of 64 bits, an int64 tensor of one element on the device of x, or None to draw one from
            PyTorch's generator. The same seed drops the same elements on every backend.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        The result, contiguous, in the shape and dtype of x.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a probability, bias or seed that does not fit, or on another device; an unknown backend.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    check_tensor("x", x, DTYPES)
    if bias is not None:
        _check_bias(x, bias)
    check_probability("p", p)
    drawn = seed_tensor(seed, p, x.device)
    x = x.contiguous()
    if _choose(backend, x.device, x.dtype) == "reference":
        return reference.forward(x, bias, drawn, p)
    if bias is None or x.shape[-1] % GROUP == 0:
        return cast(Tensor, _ReluDropout.apply(x, None if bias is None else bias.contiguous(), drawn, p))
    return cast(Tensor, _ReluDropout.apply(x + bias, None, drawn, p)).to(x.dtype)


def _check_bias(x: Tensor, bias: Tensor) -> None:
    check_tensor("bias", bias, (torch.promote_types(x.dtype, torch.float32),), x.device)
    if x.dim() < 1:
        raise ValueError(f"x must be [..., C] with a bias, got {list(x.shape)}")
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be [{x.shape[-1]}], got {list(bias.shape)}")


@assumed_constant
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("relu_dropout", backend, device, dtype)


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
        out: Tensor = ops.relu_dropout_triton(x, bias, seed, p)
        ctx.save_for_backward(out)
        ctx.p = p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (out,) = ctx.saved_tensors
        biased = ctx.needs_input_grad[1]
        grad_x, grad_bias = ops.relu_dropout_backward_triton(grad.contiguous(), out, ctx.p, biased)
        return grad_x, grad_bias if biased else None, None, None
