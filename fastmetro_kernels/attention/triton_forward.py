"""Triton kernels of the forward pass of topology-masked attention: online softmax over gathered key tiles.

Online softmax after Milakov and Gimelshein (2018) and FlashAttention (Dao et al., 2022). The change to base 2 comes
after the maximum is subtracted: folded into the scale, it would round larger numbers. Dot products of float32 are
IEEE float32, or by choice a sum of three products of TF32: TF32 alone would miss the accuracy of the reference by
three digits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from fastmetro_kernels.attention.triton_tiles import (
    HUB_ROWS,
    UNSPECIALIZED,
    dense_tile,
    dropout_keep,
    hub_share,
    listed_tile,
    load_rows,
    program_place,
    store_rows,
    window_rows,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    q, k_base, v_base, tokens, valid, seen, row_tokens, peak, total, out,
    stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
    scale, seed, batch_head, threshold,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the owned rows see one more tile of keys."""
    k = load_rows(k_base, tokens, valid, stride_k_token, stride_k_dim, DIM, BLOCK_DIM)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    reference = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2((scores - reference[:, None]) * LOG2E)
    decay = tl.exp2((peak - reference) * LOG2E)
    total = total * decay + tl.sum(weights, 1)
    if seed is not None:
        keep = dropout_keep(seed, batch_head, tokens[None, :], row_tokens[:, None], threshold)
        weights = tl.where(keep, weights, 0.0)
    v = load_rows(v_base, tokens, valid, stride_v_token, stride_v_dim, DIM, BLOCK_DIM)
    out = out * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_peak, total, out


@triton.jit
def _hub_outputs(
    q_base, k_base, v_base, hubs, hub_valid, begin, end, keep_scale,
    stride_q_token, stride_q_dim, stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
    scale, seed, batch_head, threshold,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exp of a tile of hubs over the tokens ``begin .. end - 1``."""
    q_tile = load_rows(q_base, hubs, hub_valid, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
    peak = tl.full((HUB_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((HUB_ROWS,), tl.float32)
    acc = tl.zeros((HUB_ROWS, BLOCK_DIM), tl.float32)
    for first in range(begin, end, KEYS):
        key_tokens, valid, seen = dense_tile(first, end, KEYS)
        peak, total, acc = _attend(
            q_tile, k_base, v_base, key_tokens, valid, seen, hubs, peak, total, acc,
            stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, DIM, BLOCK_DIM, PRECISION,
        )  # fmt: skip
    return acc * (keep_scale / total)[:, None], peak + tl.log(total)


@triton.jit
def _window_outputs(
    q_base, k_base, v_base, rows, row_valid, keys, row_masks, list_begin, list_length, num_hubs, keep_scale,
    stride_q_token, stride_q_dim, stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
    scale, seed, batch_head, threshold,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exp of the rows of a window over the hubs and the window's list."""
    q_tile = load_rows(q_base, rows, row_valid, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    if ONE_TILE:
        key_tokens, valid, seen = listed_tile(0, keys, row_masks, list_begin, list_length, num_hubs, ROWS, KEYS)
        peak, total, acc = _attend(
            q_tile, k_base, v_base, key_tokens, valid, seen, rows, peak, total, acc,
            stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, DIM, BLOCK_DIM, PRECISION,
        )  # fmt: skip
    else:
        for first in range(0, num_hubs + list_length, KEYS):
            key_tokens, valid, seen = listed_tile(first, keys, row_masks, list_begin, list_length, num_hubs, ROWS, KEYS)
            peak, total, acc = _attend(
                q_tile, k_base, v_base, key_tokens, valid, seen, rows, peak, total, acc,
                stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
                scale, seed, batch_head, threshold, DIM, BLOCK_DIM, PRECISION,
            )  # fmt: skip
    has_keys = total != 0.0  # NaN stays NaN
    log_total = tl.where(has_keys, peak + tl.log(tl.where(has_keys, total, 1.0)), -float("inf"))
    return acc * (keep_scale / tl.where(has_keys, total, 1.0))[:, None], log_total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    q, k, v, out, lse, partial_out, partial_lse,
    row_order, key_offsets, keys, row_masks, seed,
    stride_q_batch, stride_q_token, stride_q_head, stride_q_dim,
    stride_k_batch, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_batch, stride_v_token, stride_v_head, stride_v_dim,
    heads, tokens, num_hubs, slots, batches, slots_first, splits, split_tokens,
    scale, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one window, or of 16 hubs over one share of the keys (written as partials if there are several)."""
    batch, head, slot = program_place(heads, slots, batches, slots_first)
    batch_head = batch * heads + head
    head64 = head.to(tl.int64)
    q_base = q + batch * stride_q_batch + head64 * stride_q_head
    k_base = k + batch * stride_k_batch + head64 * stride_k_head
    v_base = v + batch * stride_v_batch + head64 * stride_v_head
    out_base = out + (batch * tokens * heads + head) * DIM
    lse_base = lse + batch_head * tokens
    hub_slots = (num_hubs + HUB_ROWS - 1) // HUB_ROWS * splits

    # Triton gives a name one type: what the branches hold in tiles of different height has different names.
    if slot < hub_slots:
        hubs, hub_valid, begin, end = hub_share(slot, splits, split_tokens, tokens, num_hubs)
        hub_acc, hub_lse = _hub_outputs(
            q_base, k_base, v_base, hubs, hub_valid, begin, end, keep_scale,
            stride_q_token, stride_q_dim, stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, DIM, BLOCK_DIM, KEYS, PRECISION,
        )  # fmt: skip
        if partial_out is not None:
            share = (batch_head * splits + slot % splits) * (hub_slots // splits * HUB_ROWS)
            store_rows(partial_out + share * DIM, hubs, hub_valid, DIM, hub_acc, DIM, BLOCK_DIM)
            tl.store(partial_lse + share + hubs, hub_lse, mask=hub_valid)
        else:
            store_rows(out_base, hubs, hub_valid, heads * DIM, hub_acc, DIM, BLOCK_DIM)
            tl.store(lse_base + hubs, hub_lse, mask=hub_valid)
    else:
        rows, row_valid, list_begin, list_length = window_rows(slot - hub_slots, row_order, key_offsets, num_hubs, ROWS)
        acc, log_total = _window_outputs(
            q_base, k_base, v_base, rows, row_valid, keys, row_masks, list_begin, list_length, num_hubs, keep_scale,
            stride_q_token, stride_q_dim, stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, DIM, BLOCK_DIM, ROWS, KEYS, ONE_TILE, PRECISION,
        )  # fmt: skip
        store_rows(out_base, rows, row_valid, heads * DIM, acc, DIM, BLOCK_DIM)
        tl.store(lse_base + rows, log_total, mask=row_valid)


@triton.jit
def combine_outputs_kernel(
    partial_out, partial_lse, out, lse, heads, tokens, num_hubs, splits,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Hub rows whose keys were split: weigh the partial outputs by their share of the softmax, in fixed order."""
    hub_tiles = (num_hubs + HUB_ROWS - 1) // HUB_ROWS
    batch, head, tile = program_place(heads, hub_tiles, 1, 0)
    batch_head = batch * heads + head
    rows = tile * HUB_ROWS + tl.arange(0, HUB_ROWS)
    row_valid = rows < num_hubs
    peak = tl.full((HUB_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((HUB_ROWS,), tl.float32)
    acc = tl.zeros((HUB_ROWS, BLOCK_DIM), tl.float32)
    for split in range(0, splits):
        share = (batch_head * splits + split) * hub_tiles * HUB_ROWS
        log_total = tl.load(partial_lse + share + rows, mask=row_valid, other=0.0)
        part = load_rows(partial_out + share * DIM, rows, row_valid, DIM, 1, DIM, BLOCK_DIM)
        new_peak = tl.maximum(peak, log_total)
        decay = tl.exp2((peak - new_peak) * LOG2E)
        weight = tl.exp2((log_total - new_peak) * LOG2E)
        total = total * decay + weight
        acc = acc * decay[:, None] + part * weight[:, None]
        peak = new_peak
    store_rows(
        out + (batch * tokens * heads + head) * DIM, rows, row_valid, heads * DIM, acc / total[:, None], DIM, BLOCK_DIM
    )
    tl.store(lse + batch_head * tokens + rows, peak + tl.log(total), mask=row_valid)
