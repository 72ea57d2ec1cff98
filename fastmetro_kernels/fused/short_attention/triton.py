"""The Triton backend of attention over few keys: CUDA devices, or CPU tensors in Triton's interpreter.

All keys of a head are one tile, so the softmax is taken in one pass over complete rows of scores, which never leave
the registers. A program makes the outputs of a tile of queries of one head; nothing is tuned at run time.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device
from fastmetro_kernels.fused.short_attention import ops
from fastmetro_kernels.fused.short_attention.configs import ShortAttentionConfig, pinned

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tokens(
    base, tokens, count, stride_token, stride_dim, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Rows [len(tokens), BLOCK_DIM] of one head, 0 beyond the last token and the last number of the head."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = (tokens < count)[:, None]
    if DIM < BLOCK_DIM:
        mask = mask & (dim < DIM)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * stride_token + dim.to(tl.int64)[None, :] * stride_dim
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def attend(q_tile, k_tile, v_tile, valid, scale):
    """softmax(scale q k^T) v over the valid keys of a head, of which there is at least one, in float32."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    scores = tl.where(valid[None, :], scores, -float("inf"))
    # The change to base 2 comes after the maximum is subtracted: folded into the scale, it would round larger numbers.
    weights = tl.exp2((scores - tl.max(scores, 1)[:, None]) * LOG2E)
    total = tl.sum(weights, 1)
    return tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee") / total[:, None]


@triton.jit(do_not_specialize=["queries", "keys"])
def short_attention_kernel(
    q, k, v, out,
    queries, keys, heads,
    stride_q_batch, stride_q_token, stride_q_head, stride_q_dim,
    stride_k_batch, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_batch, stride_v_token, stride_v_head, stride_v_dim,
    scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The outputs of ROWS queries of one head; heads run fastest, so that programs at a time share cache lines."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    tile = program // heads
    tiles = tl.cdiv(queries, ROWS)
    batch = (tile // tiles).to(tl.int64)
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    await_earlier_kernels(EARLY)
    q_base = q + batch * stride_q_batch + head * stride_q_head
    k_base = k + batch * stride_k_batch + head * stride_k_head
    v_base = v + batch * stride_v_batch + head * stride_v_head
    q_tile = load_tokens(q_base, row, queries, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
    k_tile = load_tokens(k_base, key, keys, stride_k_token, stride_k_dim, DIM, BLOCK_DIM)
    v_tile = load_tokens(v_base, key, keys, stride_v_token, stride_v_dim, DIM, BLOCK_DIM)
    result = attend(q_tile, k_tile, v_tile, key < keys, scale)
    dim = tl.arange(0, BLOCK_DIM)
    mask = (row < queries)[:, None] & (dim < DIM)[None, :]
    target = ((batch * queries + row.to(tl.int64)) * heads + head) * DIM
    tl.store(out + target[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=mask)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, config: Sequence[int]) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_arguments(q, k, v, config)
    batch, queries, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    keys = k.shape[1]
    tile = ShortAttentionConfig(*config) if config else pinned(batch * heads, queries, q.element_size())
    early = launches_early(q)
    with on_device(q):
        short_attention_kernel[(batch * heads * triton.cdiv(queries, tile.rows),)](
            q, k, v, out, queries, keys, heads, *q.stride(), *k.stride(), *v.stride(), scale,
            DIM=dim, BLOCK_DIM=max(16, triton.next_power_of_2(dim)), ROWS=tile.rows,
            KEYS=max(16, triton.next_power_of_2(keys)), EARLY=early,
            num_warps=tile.warps, num_stages=1, **launch_options(early),
        )  # fmt: skip
    return out
