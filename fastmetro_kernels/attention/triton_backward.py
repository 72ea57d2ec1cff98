"""Triton kernels of the backward pass of topology-masked attention: all sums are gathered, none uses atomics.

The row pass owns queries and streams keys (dQ, and delta, the row sums that the softmax gradient needs); the column
pass owns keys and streams the queries that see them (dK, dV). Weights are recomputed from the log-sum-exp, as in
FlashAttention-2 (Dao, 2023, section 3.1). Hub rows and columns are dense: their work is split over tokens, and the
partial sums are added in a fixed order.
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
def _row_weights(
    q, grad_out, log_total, k_base, v_base, tokens, valid, seen, row_tokens,
    stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
    scale, seed, batch_head, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights of the owned rows on one tile of keys, the gradients of these weights, and the keys."""
    k = load_rows(k_base, tokens, valid, stride_k_token, stride_k_dim, DIM, BLOCK_DIM)
    v = load_rows(v_base, tokens, valid, stride_v_token, stride_v_dim, DIM, BLOCK_DIM)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2((scores - log_total[:, None]) * LOG2E), 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    if seed is not None:
        keep = dropout_keep(seed, batch_head, tokens[None, :], row_tokens[:, None], threshold)
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    return weights, grad_weights, k


@triton.jit
def _row_sums(grad_out, out_base, rows, row_valid, stride_token, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """sum(grad_out * out) of the owned rows: what delta needs of all their keys."""
    out = load_rows(out_base, rows, row_valid, stride_token, 1, DIM, BLOCK_DIM)
    return tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)


@triton.jit
def _hub_queries(
    q, grad_out, log_total, delta, k_base, v_base, hubs, begin, end,
    stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
    scale, seed, batch_head, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale of a tile of hubs from the keys ``begin .. end - 1``."""
    acc = tl.zeros((HUB_ROWS, BLOCK_DIM), tl.float32)
    for first in range(begin, end, KEYS):
        key_tokens, valid, seen = dense_tile(first, end, KEYS)
        weights, grad_weights, k = _row_weights(
            q, grad_out, log_total, k_base, v_base, key_tokens, valid, seen, hubs,
            stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, PRECISION,
        )  # fmt: skip
        grad_scores = weights * (grad_weights - delta[:, None])
        acc += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    return acc


@triton.jit
def _window_queries(
    q, grad_out, log_total, delta, k_base, v_base, rows, keys, row_masks, list_begin, list_length, num_hubs,
    stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
    scale, seed, batch_head, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale of the rows of a window, and delta, which with one tile still lacks the sums over their keys."""
    if ONE_TILE:
        key_tokens, valid, seen = listed_tile(0, keys, row_masks, list_begin, list_length, num_hubs, ROWS, KEYS)
        weights, grad_weights, k = _row_weights(
            q, grad_out, log_total, k_base, v_base, key_tokens, valid, seen, rows,
            stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, PRECISION,
        )  # fmt: skip
        delta += tl.sum(weights * grad_weights, 1)
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    else:
        acc = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
        for first in range(0, num_hubs + list_length, KEYS):
            key_tokens, valid, seen = listed_tile(first, keys, row_masks, list_begin, list_length, num_hubs, ROWS, KEYS)
            weights, grad_weights, k = _row_weights(
                q, grad_out, log_total, k_base, v_base, key_tokens, valid, seen, rows,
                stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
                scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, PRECISION,
            )  # fmt: skip
            grad_scores = weights * (grad_weights - delta[:, None])
            acc += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    return acc, delta


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_rows_kernel(
    grad_out, grad_lse, q, k, v, out, lse, grad_q, delta, partials,
    row_order, key_offsets, keys, row_masks, seed,
    stride_g_batch, stride_g_token, stride_g_head, stride_g_dim,
    stride_q_batch, stride_q_token, stride_q_head, stride_q_dim,
    stride_k_batch, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_batch, stride_v_token, stride_v_head, stride_v_dim,
    heads, tokens, num_hubs, slots, batches, slots_first, splits, split_tokens,
    scale, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and delta of one window, or of 16 hubs over one share of the keys."""
    batch, head, slot = program_place(heads, slots, batches, slots_first)
    batch_head = batch * heads + head
    head64 = head.to(tl.int64)
    q_base = q + batch * stride_q_batch + head64 * stride_q_head
    k_base = k + batch * stride_k_batch + head64 * stride_k_head
    v_base = v + batch * stride_v_batch + head64 * stride_v_head
    grad_out_base = grad_out + batch * stride_g_batch + head64 * stride_g_head
    contiguous_base = (batch * tokens * heads + head) * DIM
    lse_base = batch_head * tokens
    hub_slots = (num_hubs + HUB_ROWS - 1) // HUB_ROWS * splits

    # Triton gives a name one type: what the branches hold in tiles of different height has different names.
    if slot < hub_slots:
        hubs, hub_valid, begin, end = hub_share(slot, splits, split_tokens, tokens, num_hubs)
        hub_q = load_rows(q_base, hubs, hub_valid, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
        hub_g = load_rows(grad_out_base, hubs, hub_valid, stride_g_token, stride_g_dim, DIM, BLOCK_DIM)
        hub_lse = tl.load(lse + lse_base + hubs, mask=hub_valid, other=0.0)
        hub_delta = _row_sums(hub_g, out + contiguous_base, hubs, hub_valid, heads * DIM, DIM, BLOCK_DIM)
        if grad_lse is not None:
            hub_delta -= tl.load(grad_lse + lse_base + hubs, mask=hub_valid, other=0.0)
        hub_acc = _hub_queries(
            hub_q, hub_g, hub_lse, hub_delta, k_base, v_base, hubs, begin, end,
            stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, KEYS, PRECISION,
        )  # fmt: skip
        if partials is not None:
            share = (batch_head * splits + slot % splits) * (hub_slots // splits * HUB_ROWS)
            store_rows(partials + share * DIM, hubs, hub_valid, DIM, hub_acc * scale, DIM, BLOCK_DIM)
            hub_valid = hub_valid & (slot % splits == 0)  # one share writes delta
        else:
            store_rows(grad_q + contiguous_base, hubs, hub_valid, heads * DIM, hub_acc * scale, DIM, BLOCK_DIM)
        tl.store(delta + lse_base + hubs, hub_delta, mask=hub_valid)
    else:
        rows, row_valid, list_begin, list_length = window_rows(slot - hub_slots, row_order, key_offsets, num_hubs, ROWS)
        q_tile = load_rows(q_base, rows, row_valid, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
        g_tile = load_rows(grad_out_base, rows, row_valid, stride_g_token, stride_g_dim, DIM, BLOCK_DIM)
        log_total = tl.load(lse + lse_base + rows, mask=row_valid, other=0.0)
        row_delta = tl.zeros((ROWS,), tl.float32)
        if not ONE_TILE:  # else delta follows from the tile itself, without reading the output
            row_delta += _row_sums(g_tile, out + contiguous_base, rows, row_valid, heads * DIM, DIM, BLOCK_DIM)
        if grad_lse is not None:
            row_delta -= tl.load(grad_lse + lse_base + rows, mask=row_valid, other=0.0)
        acc, row_delta = _window_queries(
            q_tile, g_tile, log_total, row_delta, k_base, v_base, rows, keys, row_masks,
            list_begin, list_length, num_hubs,
            stride_k_token, stride_k_dim, stride_v_token, stride_v_dim,
            scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, ROWS, KEYS, ONE_TILE, PRECISION,
        )  # fmt: skip
        store_rows(grad_q + contiguous_base, rows, row_valid, heads * DIM, acc * scale, DIM, BLOCK_DIM)
        tl.store(delta + lse_base + rows, row_delta, mask=row_valid)


@triton.jit
def _column_step(
    k, v, q_base, g_base, lse_base, delta_base, tokens, valid, seen, column_tokens, grad_k, grad_v,
    stride_q_token, stride_q_dim, stride_g_token, stride_g_dim,
    scale, seed, batch_head, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dK / scale and dV of the owned keys what one tile of queries contributes (tiles are transposed)."""
    q = load_rows(q_base, tokens, valid, stride_q_token, stride_q_dim, DIM, BLOCK_DIM)
    grad_out = load_rows(g_base, tokens, valid, stride_g_token, stride_g_dim, DIM, BLOCK_DIM)
    log_total = tl.load(lse_base + tokens, mask=valid, other=0.0)
    delta = tl.load(delta_base + tokens, mask=valid, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2((scores - log_total[None, :]) * LOG2E), 0.0)
    grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    dropped = weights
    if seed is not None:
        keep = dropout_keep(seed, batch_head, column_tokens[:, None], tokens[None, :], threshold)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    grad_v = grad_v + tl.dot(dropped.to(q.dtype), grad_out, input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = grad_k + tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_columns_kernel(
    grad_out, q, k, v, lse, delta, grad_k, grad_v, partials_k, partials_v,
    row_order, key_offsets, keys, row_masks, seed,
    stride_g_batch, stride_g_token, stride_g_head, stride_g_dim,
    stride_q_batch, stride_q_token, stride_q_head, stride_q_dim,
    stride_k_batch, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_batch, stride_v_token, stride_v_head, stride_v_dim,
    heads, tokens, num_hubs, slots, batches, slots_first, splits, split_tokens,
    scale, threshold, keep_scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one window of the transposed schedule, or of 16 hubs over one share of the queries."""
    batch, head, slot = program_place(heads, slots, batches, slots_first)
    batch_head = batch * heads + head
    head64 = head.to(tl.int64)
    q_base = q + batch * stride_q_batch + head64 * stride_q_head
    k_base = k + batch * stride_k_batch + head64 * stride_k_head
    v_base = v + batch * stride_v_batch + head64 * stride_v_head
    g_base = grad_out + batch * stride_g_batch + head64 * stride_g_head
    lse_base = lse + batch_head * tokens
    delta_base = delta + batch_head * tokens
    contiguous_base = (batch * tokens * heads + head) * DIM
    hub_slots = (num_hubs + HUB_ROWS - 1) // HUB_ROWS * splits

    if slot < hub_slots:
        hubs, hub_valid, begin, end = hub_share(slot, splits, split_tokens, tokens, num_hubs)
        hub_k = load_rows(k_base, hubs, hub_valid, stride_k_token, stride_k_dim, DIM, BLOCK_DIM)
        hub_v = load_rows(v_base, hubs, hub_valid, stride_v_token, stride_v_dim, DIM, BLOCK_DIM)
        sum_k = tl.zeros((HUB_ROWS, BLOCK_DIM), tl.float32)
        sum_v = tl.zeros((HUB_ROWS, BLOCK_DIM), tl.float32)
        for first in range(begin, end, KEYS):
            row_tokens, valid, all_seen = dense_tile(first, end, KEYS)
            sum_k, sum_v = _column_step(
                hub_k, hub_v, q_base, g_base, lse_base, delta_base, row_tokens, valid, all_seen, hubs, sum_k, sum_v,
                stride_q_token, stride_q_dim, stride_g_token, stride_g_dim,
                scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, PRECISION,
            )  # fmt: skip
        if partials_k is not None:
            share = (batch_head * splits + slot % splits) * (hub_slots // splits * HUB_ROWS)
            store_rows(partials_k + share * DIM, hubs, hub_valid, DIM, sum_k * scale, DIM, BLOCK_DIM)
            store_rows(partials_v + share * DIM, hubs, hub_valid, DIM, sum_v, DIM, BLOCK_DIM)
        else:
            store_rows(grad_k + contiguous_base, hubs, hub_valid, heads * DIM, sum_k * scale, DIM, BLOCK_DIM)
            store_rows(grad_v + contiguous_base, hubs, hub_valid, heads * DIM, sum_v, DIM, BLOCK_DIM)
    else:
        columns, column_valid, list_begin, list_length = window_rows(
            slot - hub_slots, row_order, key_offsets, num_hubs, ROWS
        )
        k_tile = load_rows(k_base, columns, column_valid, stride_k_token, stride_k_dim, DIM, BLOCK_DIM)
        v_tile = load_rows(v_base, columns, column_valid, stride_v_token, stride_v_dim, DIM, BLOCK_DIM)
        acc_k = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
        acc_v = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
        if ONE_TILE:
            row_tokens, valid, seen = listed_tile(0, keys, row_masks, list_begin, list_length, num_hubs, ROWS, KEYS)
            acc_k, acc_v = _column_step(
                k_tile, v_tile, q_base, g_base, lse_base, delta_base, row_tokens, valid, seen, columns, acc_k, acc_v,
                stride_q_token, stride_q_dim, stride_g_token, stride_g_dim,
                scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, PRECISION,
            )  # fmt: skip
        else:
            for first in range(0, num_hubs + list_length, KEYS):
                row_tokens, valid, seen = listed_tile(
                    first, keys, row_masks, list_begin, list_length, num_hubs, ROWS, KEYS
                )
                acc_k, acc_v = _column_step(
                    k_tile, v_tile, q_base, g_base, lse_base, delta_base, row_tokens, valid, seen, columns,
                    acc_k, acc_v, stride_q_token, stride_q_dim, stride_g_token, stride_g_dim,
                    scale, seed, batch_head, threshold, keep_scale, DIM, BLOCK_DIM, PRECISION,
                )  # fmt: skip
        store_rows(grad_k + contiguous_base, columns, column_valid, heads * DIM, acc_k * scale, DIM, BLOCK_DIM)
        store_rows(grad_v + contiguous_base, columns, column_valid, heads * DIM, acc_v, DIM, BLOCK_DIM)


@triton.jit
def combine_gradients_kernel(
    partials_q, partials_k, partials_v, grad_q, grad_k, grad_v, heads, tokens, num_hubs, splits,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Hub tokens whose work was split: add the partial gradients in the order of the shares."""
    which = tl.program_id(1)
    hub_tiles = (num_hubs + HUB_ROWS - 1) // HUB_ROWS
    batch, head, tile = program_place(heads, hub_tiles, 1, 0)
    rows = tile * HUB_ROWS + tl.arange(0, HUB_ROWS)
    row_valid = rows < num_hubs
    partials = partials_q
    target = grad_q
    if which == 1:
        partials = partials_k
        target = grad_k
    elif which == 2:
        partials = partials_v
        target = grad_v
    acc = tl.zeros((HUB_ROWS, BLOCK_DIM), tl.float32)
    for split in range(0, splits):
        share = ((batch * heads + head) * splits + split) * hub_tiles * HUB_ROWS
        acc += load_rows(partials + share * DIM, rows, row_valid, DIM, 1, DIM, BLOCK_DIM)
    base = target + (batch * tokens * heads + head) * DIM
    store_rows(base, rows, row_valid, heads * DIM, acc, DIM, BLOCK_DIM)
