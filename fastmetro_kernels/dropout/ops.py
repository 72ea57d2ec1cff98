"""Schemas and shape rules of the dropout's ops; ``triton.py``, imported by the first call, implements them.

They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.dropout.random import kept

NAMESPACE = "fastmetro_kernels"

# dropout(relu(x)); `seed` is one int64, or None where nothing is dropped.
torch.library.define(
    f"{NAMESPACE}::relu_dropout_triton",
    "(Tensor x, Tensor? seed, float p) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of x: what was dropped `out` tells.
torch.library.define(
    f"{NAMESPACE}::relu_dropout_backward_triton",
    "(Tensor grad, Tensor out, float p) -> Tensor",
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


def check_backward(grad: Tensor, out: Tensor) -> None:
    """All rules of the backward op."""
    check_line("grad", grad)
    check_line("out", out)
    fits = grad.shape == out.shape and grad.dtype == out.dtype
    torch._check(fits, lambda: f"grad must be {out.dtype} {tuple(out.shape)}, got {grad.dtype} {tuple(grad.shape)}")


@torch.library.register_fake(f"{NAMESPACE}::relu_dropout_triton")
def _fake(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    check_line("x", x)
    check_seed(seed)
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::relu_dropout_backward_triton")
def _fake_backward(grad: Tensor, out: Tensor, p: float) -> Tensor:
    check_backward(grad, out)
    return torch.empty_like(grad)


@torch.library.register_fake(f"{NAMESPACE}::dropout_kept")
def _fake_kept(seed: Tensor, rows: int, width: int, p: float) -> Tensor:
    check_seed(seed)
    return torch.empty((rows, width), dtype=torch.bool, device=seed.device)


def _forward(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    from fastmetro_kernels.dropout import triton

    return triton.forward(x, seed, p)


def _backward(grad: Tensor, out: Tensor, p: float) -> Tensor:
    from fastmetro_kernels.dropout import triton

    return triton.backward(grad, out, p)


torch.library.impl(f"{NAMESPACE}::dropout_kept", "CompositeExplicitAutograd", kept)
for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::relu_dropout_triton", _device, _forward)
    torch.library.impl(f"{NAMESPACE}::relu_dropout_backward_triton", _device, _backward)

relu_dropout_triton = torch.ops.fastmetro_kernels.relu_dropout_triton.default
dropout_kept = torch.ops.fastmetro_kernels.dropout_kept.default
relu_dropout_backward_triton = torch.ops.fastmetro_kernels.relu_dropout_backward_triton.default
