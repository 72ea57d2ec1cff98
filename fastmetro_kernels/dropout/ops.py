"""Schemas and shape rules of the dropout's ops; ``triton.py``, imported by the first call, implements them.

They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.dropout.random import GROUP, kept

NAMESPACE = "fastmetro_kernels"

# dropout(relu(x + bias)); `seed` is one int64, or None where nothing is dropped. With a bias, rows are multiples of 8.
torch.library.define(
    f"{NAMESPACE}::relu_dropout_triton",
    "(Tensor x, Tensor? bias, Tensor? seed, float p) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of x, and that of the bias, empty unless it is `biased`: what was dropped `out` tells.
torch.library.define(
    f"{NAMESPACE}::relu_dropout_backward_triton",
    "(Tensor grad, Tensor out, float p, bool biased) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# Which elements of [rows, width] stay, boolean: an op, so that a trace holds one node and not 200. On every device.
torch.library.define(
    f"{NAMESPACE}::dropout_kept",
    "(Tensor seed, SymInt rows, SymInt width, float p) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_line(name: str, tensor: Tensor) -> None:
    """Strides and dtype of what both ops take, in a form that tracing understands."""
    torch._check(tensor.dtype != torch.float64, lambda: "relu_dropout_triton does not take float64")
    torch._check(tensor.is_contiguous(), lambda: f"{name} must be contiguous")


def check_seed(seed: Tensor | None) -> None:
    """One number."""
    if seed is not None:
        fits = seed.dtype == torch.int64 and seed.numel() == 1
        torch._check(fits, lambda: "seed must be one int64")


def check_forward(x: Tensor, bias: Tensor | None, seed: Tensor | None) -> None:
    """All rules of the forward op."""
    check_line("x", x)
    check_seed(seed)
    if bias is not None:
        rows = x.dim() >= 1 and x.size(-1) % GROUP == 0
        torch._check(rows, lambda: f"x must have rows of a multiple of {GROUP} with a bias, got {tuple(x.shape)}")
        fits = bias.shape == x.shape[-1:] and bias.dtype == torch.float32 and bias.is_contiguous()
        torch._check(fits, lambda: f"bias must be float32 [{x.size(-1)}], contiguous")


def check_backward(grad: Tensor, out: Tensor, biased: bool) -> None:
    """All rules of the backward op."""
    check_line("grad", grad)
    check_line("out", out)
    fits = grad.shape == out.shape and grad.dtype == out.dtype
    torch._check(fits, lambda: f"grad must be {out.dtype} {tuple(out.shape)}, got {grad.dtype} {tuple(grad.shape)}")
    torch._check(not biased or out.dim() >= 1, lambda: "out must be [..., C] with a bias")


def empty_gradients(grad: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """Memory for what the backward op returns."""
    return torch.empty_like(grad), grad.new_empty(grad.size(-1) if biased else 0, dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::relu_dropout_triton")
def _fake(x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    check_forward(x, bias, seed)
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::relu_dropout_backward_triton")
def _fake_backward(grad: Tensor, out: Tensor, p: float, biased: bool) -> tuple[Tensor, Tensor]:
    check_backward(grad, out, biased)
    return empty_gradients(grad, biased)


@torch.library.register_fake(f"{NAMESPACE}::dropout_kept")
def _fake_kept(seed: Tensor, rows: int, width: int, p: float) -> Tensor:
    check_seed(seed)
    return torch.empty((rows, width), dtype=torch.bool, device=seed.device)


def _forward(x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    from fastmetro_kernels.dropout import triton

    return triton.forward(x, bias, seed, p)


def _backward(grad: Tensor, out: Tensor, p: float, biased: bool) -> tuple[Tensor, Tensor]:
    from fastmetro_kernels.dropout import triton

    return triton.backward(grad, out, p, biased)


torch.library.impl(f"{NAMESPACE}::dropout_kept", "CompositeExplicitAutograd", kept)
for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::relu_dropout_triton", _device, _forward)
    torch.library.impl(f"{NAMESPACE}::relu_dropout_backward_triton", _device, _backward)

relu_dropout_triton = torch.ops.fastmetro_kernels.relu_dropout_triton.default
dropout_kept = torch.ops.fastmetro_kernels.dropout_kept.default
relu_dropout_backward_triton = torch.ops.fastmetro_kernels.relu_dropout_backward_triton.default
