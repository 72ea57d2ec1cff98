"""Schema and shape rules of attention over few keys; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.fused.short_attention.configs import MAX_DIM, MAX_KEYS, ShortAttentionConfig, problem

NAMESPACE = "fastmetro_kernels"

# `config` is a ShortAttentionConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::short_attention_triton",
    "(Tensor q, Tensor k, Tensor v, float scale, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, config: Sequence[int]) -> None:
    """Shape, dtype and device rules of the op, in a form that tracing understands."""
    torch._check(q.dim() == 4, lambda: f"q must be [B, L, H, D], got {tuple(q.shape)}")
    batch, _, heads, dim = q.shape
    torch._check(q.dtype != torch.float64, lambda: "short_attention_triton does not take float64")
    torch._check(k.dim() == 4, lambda: f"k must be [B, S, H, D], got {tuple(k.shape)}")
    keys = k.size(1)
    for name, tensor in (("k", k), ("v", v)):
        torch._check(
            tensor.dim() == 4 and tuple(tensor.shape) == (batch, keys, heads, dim),
            lambda name=name, tensor=tensor: (
                f"{name} must be [{batch}, {keys}, {heads}, {dim}], got {tuple(tensor.shape)}"
            ),
        )
        torch._check(tensor.dtype == q.dtype, lambda name=name: f"{name} must be {q.dtype} like q")
        torch._check(tensor.device == q.device, lambda name=name: f"{name} must be on {q.device} like q")
    torch._check(1 <= keys <= MAX_KEYS, lambda: f"k must have 1 to {MAX_KEYS} tokens, got {keys}")
    torch._check(1 <= dim <= MAX_DIM, lambda: f"head dims go from 1 to {MAX_DIM}, got {dim}")
    if config:
        found = problem(ShortAttentionConfig(*config)) if len(config) == 2 else f"two numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::short_attention_triton")
def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, config: Sequence[int]) -> Tensor:
    check_arguments(q, k, v, config)
    return q.new_empty(tuple(q.shape))


def _short_attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, config: Sequence[int]) -> Tensor:
    from fastmetro_kernels.fused.short_attention import triton

    return triton.attention(q, k, v, scale, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::short_attention_triton", _device, _short_attention_triton)

short_attention_triton = torch.ops.fastmetro_kernels.short_attention_triton.default
