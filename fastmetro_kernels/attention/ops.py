"""Schemas and shape rules of the attention ops. Kernels are registered elsewhere; nothing here runs one.

`csrc/attention/` implements the native ops for CPU and CUDA, `triton.py` the Triton ones. Schemas live here, so
that tracing (`torch.compile`, `torch.export`) works whether or not a kernel is present.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "fastmetro_kernels"


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Log-sum-exp is float32, except that float64 inputs give float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def define(name: str, schema: str) -> None:
    """Declares `fastmetro_kernels::name`; kernels may be registered before or after."""
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shape and dtype rules that all attention ops share, in a form that tracing understands."""
    torch._check(q.dim() == 4, lambda: f"q must be [B, L, H, D], got {tuple(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        torch._check(tensor.dim() == 4, lambda: f"{name} must be [B, L, H, D], got {tuple(tensor.shape)}")
        for axis in range(4):
            torch._check(
                tensor.size(axis) == q.size(axis),
                lambda: f"{name} must have the shape of q {tuple(q.shape)}, got {tuple(tensor.shape)}",
            )
        torch._check(tensor.dtype == q.dtype, lambda: f"{name} must be {q.dtype} as q, got {tensor.dtype}")
        torch._check(tensor.device == q.device, lambda: f"{name} must be on {q.device} as q, got {tensor.device}")


def check_lists(q: Tensor, row_offsets: Tensor, columns: Tensor, num_hubs: int) -> None:
    """The neighbour lists must be int32 and describe the L - num_hubs vertices of q."""
    for name, tensor in (("row_offsets", row_offsets), ("columns", columns)):
        torch._check(tensor.dim() == 1, lambda: f"{name} must have one axis, got {tuple(tensor.shape)}")
        torch._check(tensor.dtype == torch.int32, lambda: f"{name} must be int32, got {tensor.dtype}")
        torch._check(tensor.device == q.device, lambda: f"{name} must be on {q.device}, got {tensor.device}")
    torch._check(0 <= num_hubs <= 64, lambda: f"num_hubs must be 0 to 64, got {num_hubs}")
    torch._check(
        q.size(1) == num_hubs + row_offsets.size(0) - 1,
        lambda: f"q has {q.size(1)} tokens, the topology {num_hubs} + {row_offsets.size(0) - 1}",
    )


def check_dropout(q: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    """A seed tensor is needed exactly when weights are dropped."""
    torch._check(0.0 <= dropout_p < 1.0, lambda: f"dropout_p must be in [0, 1), got {dropout_p}")
    torch._check(dropout_p == 0.0 or seed is not None, lambda: "dropout_p > 0 needs a seed")
    if seed is not None:
        torch._check(seed.dtype == torch.int64, lambda: f"seed must be int64, got {seed.dtype}")
        torch._check(seed.numel() == 1, lambda: f"seed must have one element, got {tuple(seed.shape)}")
        torch._check(seed.device == q.device, lambda: f"seed must be on {q.device}, got {seed.device}")


def check_saved(q: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """What the backward ops receive besides the inputs: the outputs of the forward and their gradients."""
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        torch._check(tensor.dtype == q.dtype, lambda: f"{name} must be {q.dtype} as q, got {tensor.dtype}")
        torch._check(tensor.dim() == 4, lambda: f"{name} must be [B, L, H, D], got {tuple(tensor.shape)}")
        for axis in range(4):
            torch._check(tensor.size(axis) == q.size(axis), lambda: f"{name} must have the shape of q")
    rows = (q.size(0), q.size(2), q.size(1))
    for name, maybe in (("lse", lse), ("grad_lse", grad_lse)):
        if maybe is None:
            continue
        torch._check(maybe.dtype == lse_dtype(q.dtype), lambda: f"{name} must be {lse_dtype(q.dtype)}")
        torch._check(maybe.dim() == 3, lambda: f"{name} must be [B, H, L], got {tuple(maybe.shape)}")
        for axis in range(3):
            torch._check(maybe.size(axis) == rows[axis], lambda: f"{name} must be [B, H, L]")


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """The contiguous outputs (out [B, L, H, D] in q.dtype, lse [B, H, L]) of every forward op."""
    batch, tokens, heads, dim = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=lse_dtype(q.dtype))
    return q.new_empty((batch, tokens, heads, dim)), lse


def empty_gradients(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The contiguous gradients (dq, dk, dv), each [B, L, H, D] in q.dtype, of every backward op."""
    shape = tuple(q.shape)
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(shape)


# ---- native (csrc/attention/) ---------------------------------------------------------------------------------

define(
    "attention_forward_native",
    "(Tensor q, Tensor k, Tensor v, Tensor row_offsets, Tensor columns, int num_hubs, float scale, "
    "float dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)",
)
define(
    "attention_backward_native",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor row_offsets, Tensor columns, Tensor t_row_offsets, Tensor t_columns, int num_hubs, float scale, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::attention_forward_native")
def _forward_native_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    check_lists(q, row_offsets, columns, num_hubs)
    check_dropout(q, dropout_p, seed)
    return empty_outputs(q)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward_native")
def _backward_native_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    t_row_offsets: Tensor,
    t_columns: Tensor,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_qkv(q, k, v)
    check_lists(q, row_offsets, columns, num_hubs)
    check_lists(q, t_row_offsets, t_columns, num_hubs)
    check_dropout(q, dropout_p, seed)
    check_saved(q, grad_out, grad_lse, out, lse)
    return empty_gradients(q)


# ---- Triton (triton.py) ---------------------------------------------------------------------------------------
