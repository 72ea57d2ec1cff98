"""The Triton backend of the cross-attention block: CUDA devices, or CPU tensors in Triton's interpreter.

A program makes whole rows of the output, for a tile of queries. It goes from head to head: scores, softmax and the
weighted values of one head stay in registers, and the projection of that head is added to the rows at once, so that
the heads never have to be put side by side. The order is fixed, and nothing is tuned at run time.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.cross_attention_block import ops
from fastmetro_kernels.fused.cross_attention_block.configs import BlockConfig, pinned
from fastmetro_kernels.fused.early_launch import (
    await_earlier_kernels,
    launch_options,
    launches_early,
    on_device,
    prefetch_rows,
)
from fastmetro_kernels.fused.short_attention.triton import attend, load_tokens


@triton.jit(do_not_specialize=["queries", "keys"])
def cross_attention_block_kernel(
    q, k, v, weight, bias, residual, out,
    queries, keys, features,
    stride_q_batch, stride_q_token, stride_q_head, stride_q_dim,
    stride_k_batch, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_batch, stride_v_token, stride_v_head, stride_v_dim,
    stride_weight_feature, stride_weight_dim, stride_bias_feature,
    stride_residual_batch, stride_residual_token, stride_residual_feature,
    scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    FEATURES: tl.constexpr, CONSTANT_WEIGHTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All features of ROWS queries."""
    tiles = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    feature = tl.arange(0, FEATURES)
    mask = (row < queries)[:, None] & (feature < features)[None, :]
    result = tl.zeros((ROWS, FEATURES), tl.float32)
    if not CONSTANT_WEIGHTS:
        await_earlier_kernels(EARLY)
    if bias is not None:
        added = tl.load(bias + feature * stride_bias_feature, mask=feature < features, other=0.0)
        result += added.to(tl.float32)[None, :]
    if CONSTANT_WEIGHTS:
        if EARLY:
            weight_rows = weight + tl.minimum(feature, features - 1).to(tl.int64) * stride_weight_feature
            prefetch_rows(weight_rows, stride_weight_dim, program == 0, HEADS * DIM)
        await_earlier_kernels(EARLY)
    if residual is not None:
        residual_rows = residual + batch * stride_residual_batch + row.to(tl.int64) * stride_residual_token
        kept = tl.load(residual_rows[:, None] + feature[None, :] * stride_residual_feature, mask=mask, other=0.0)
        result += kept.to(tl.float32)
    q_base, k_base, v_base = q + batch * stride_q_batch, k + batch * stride_k_batch, v + batch * stride_v_batch
    for head in range(0, HEADS):
        place = tl.cast(head, tl.int64)
        q_head, k_head = q_base + place * stride_q_head, k_base + place * stride_k_head
        q_tile = load_tokens(q_head, row, queries, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
        k_tile = load_tokens(k_head, key, keys, stride_k_token, stride_k_dim, DIM, BLOCK_DIM)
        v_tile = load_tokens(
            v_base + place * stride_v_head, key, keys, stride_v_token, stride_v_dim, DIM, BLOCK_DIM
        )  # fmt: skip
        weight_tile = load_tokens(
            weight + place * DIM * stride_weight_dim, feature, features, stride_weight_feature, stride_weight_dim,
            DIM, BLOCK_DIM,
        )  # fmt: skip
        attended = attend(q_tile, k_tile, v_tile, key < keys, scale).to(weight_tile.dtype)
        result = tl.dot(attended, tl.trans(weight_tile), result, input_precision="ieee")
    target = (batch * queries + row.to(tl.int64)) * features
    tl.store(out + target[:, None] + feature[None, :], result.to(out.dtype.element_ty), mask=mask)


def block(
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
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_arguments(q, k, v, weight, bias, residual, config)
    batch, queries, heads, dim = q.shape
    features = weight.shape[0]
    out = torch.empty((batch, queries, features), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    keys = k.shape[1]
    tile = BlockConfig(*config) if config else pinned(batch, queries, q.element_size())
    early = launches_early(q)
    with on_device(q):
        cross_attention_block_kernel[(batch * triton.cdiv(queries, tile.rows),)](
            q, k, v, weight, bias, residual, out, queries, keys, features,
            *q.stride(), *k.stride(), *v.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
            *((0, 0, 0) if residual is None else residual.stride()), scale,
            HEADS=heads, DIM=dim, BLOCK_DIM=max(16, triton.next_power_of_2(dim)), ROWS=tile.rows,
            KEYS=max(16, triton.next_power_of_2(keys)), FEATURES=max(16, triton.next_power_of_2(features)),
            CONSTANT_WEIGHTS=constant_weights, EARLY=early,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(early),
        )  # fmt: skip
    return out
