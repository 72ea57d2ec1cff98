"""Schema and shape rules of the cross-attention block; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.fused.cross_attention_block.configs import MAX_FEATURES, BlockConfig, problem
from fastmetro_kernels.fused.short_attention.ops import check_arguments as check_attention

NAMESPACE = "fastmetro_kernels"

# `config` is a BlockConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::cross_attention_block_triton",
    "(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? bias, Tensor? residual, float scale, bool constant_weights, "
    "int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: Sequence[int]
) -> None:
    """Shape, dtype and device rules of the op, in a form that tracing understands."""
    check_attention(q, k, v, ())
    batch, queries, heads, dim = q.shape
    features = weight.size(0)
    torch._check(
        weight.dim() == 2 and weight.size(1) == heads * dim and 1 <= features <= MAX_FEATURES,
        lambda: f"weight must be [1 to {MAX_FEATURES}, {heads * dim}], got {tuple(weight.shape)}",
    )
    torch._check(weight.dtype == q.dtype, lambda: f"weight must be {q.dtype} like q, got {weight.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None:
            torch._check(tensor.device == q.device, lambda name=name: f"{name} must be on {q.device} like q")
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.size(0) == features, lambda: f"bias must be [{features}], got {tuple(bias.shape)}"
        )
    if residual is not None:
        torch._check(
            residual.dim() == 3 and tuple(residual.shape) == (batch, queries, features),
            lambda: f"residual must be [{batch}, {queries}, {features}], got {tuple(residual.shape)}",
        )
    if config:
        found = problem(BlockConfig(*config)) if len(config) == 3 else f"three numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::cross_attention_block_triton")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    check_arguments(q, k, v, weight, bias, residual, config)
    return q.new_empty((q.size(0), q.size(1), weight.size(0)))


def _cross_attention_block_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    from fastmetro_kernels.fused.cross_attention_block import triton

    return triton.block(q, k, v, weight, bias, residual, scale, constant_weights, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::cross_attention_block_triton", _device, _cross_attention_block_triton)

cross_attention_block_triton = torch.ops.fastmetro_kernels.cross_attention_block_triton.default
