"""The Triton backend of the decoder tail: CUDA devices, or CPU tensors in Triton's interpreter.

A program takes a tile of tokens through the whole rest of a layer. The residual stream is in registers, in float32;
only while the heads attend does it wait where the output will be, rounded as between two layers: they need its
registers. Heads are taken one after the other, each with keys and values that are 0 in the features of the others: that
multiplies eight times as much as it needs to, but heads never have to be cut out of tiles and put side by side, and
tensor cores are not what the time goes to. The hidden features of the feed-forward block, too, are taken some at a
time. The order is fixed, and nothing is tuned at run time.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.decoder_tail import ops
from fastmetro_kernels.fused.decoder_tail.configs import TailConfig, pinned
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device
from fastmetro_kernels.fused.short_attention.triton import LOG2E


@triton.jit
def _weight_tile(base, rows, columns, count_rows, count_columns, stride, FULL: tl.constexpr):
    """[len(rows), len(columns)] of a weight whose rows are `stride` apart, 0 beyond its edges; FULL: there are none."""
    places = base + rows[:, None] * stride + columns[None, :]
    if FULL:
        return tl.load(places)
    mask = (rows < count_rows)[:, None] & (columns < count_columns)[None, :]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def _added(bias, features, count):
    return tl.load(bias + features, mask=features < count, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _norm(stream, inside, epsilon, WIDTH: tl.constexpr):
    """Layer norm of rows whose places outside are 0."""
    mean = tl.sum(stream, 1) / WIDTH
    centred = tl.where(inside[None, :], stream - mean[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + epsilon)[:, None]


@triton.jit
def _cross_attention(
    target, mask, normed, query_weight, query_bias, cross_weight, k, v, key, keys, scale,
    stride_k_token, stride_v_token,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The stream at `target` with the projected values of all heads added; all but the projection's bias."""
    feature = tl.arange(0, BLOCK)
    valid, of_head = key < keys, feature // DIM
    query_tile = _weight_tile(query_weight, feature, feature, WIDTH, WIDTH, WIDTH, FULL)
    query = tl.dot(normed, tl.trans(query_tile), input_precision="ieee") + _added(query_bias, feature, WIDTH)
    query = query.to(normed.dtype)
    k_places = k + key.to(tl.int64)[:, None] * stride_k_token + feature[None, :]
    v_places = v + key.to(tl.int64)[:, None] * stride_v_token + feature[None, :]
    values = tl.zeros(normed.shape, tl.float32)
    for head in range(0, HEADS):
        own = valid[:, None] & (of_head == head)[None, :]
        k_tile = tl.load(k_places, mask=own, other=0.0)
        v_tile = tl.load(v_places, mask=own, other=0.0)
        scores = tl.dot(query, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, -float("inf"))
        # The change to base 2 comes after the maximum is subtracted, see short_attention.
        weights = tl.exp2((scores - tl.max(scores, 1)[:, None]) * LOG2E)
        weights = weights / tl.sum(weights, 1)[:, None]
        values = tl.dot(weights.to(normed.dtype), v_tile, values, input_precision="ieee")
    cross_tile = _weight_tile(cross_weight, feature, feature, WIDTH, WIDTH, WIDTH, FULL)
    stream = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    return tl.dot(values.to(normed.dtype), tl.trans(cross_tile), stream, input_precision="ieee")


@triton.jit
def _feed_forward(
    stream, normed, expand_weight, expand_bias, contract_weight,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, FEED_FORWARD: tl.constexpr, HIDDEN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The stream with the feed-forward block added; all but its last bias."""
    feature = tl.arange(0, BLOCK)
    for first in range(0, FEED_FORWARD, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        expand_tile = _weight_tile(expand_weight, unit, feature, FEED_FORWARD, WIDTH, WIDTH, FULL)
        hidden = tl.dot(normed, tl.trans(expand_tile), input_precision="ieee") + _added(expand_bias, unit, FEED_FORWARD)
        hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(normed.dtype)
        contract_tile = _weight_tile(contract_weight, feature, unit, WIDTH, FEED_FORWARD, FEED_FORWARD, FULL)
        stream = tl.dot(hidden, tl.trans(contract_tile), stream, input_precision="ieee")
    return stream


@triton.jit(do_not_specialize=["queries", "keys"])
def decoder_tail_kernel(
    x, attended, k, v, out,
    out_weight, out_bias, query_weight, query_bias, cross_weight, cross_bias,
    expand_weight, expand_bias, contract_weight, contract_bias,
    queries, keys,
    stride_x_batch, stride_x_token, stride_attended_batch, stride_attended_token,
    stride_k_batch, stride_k_token, stride_v_batch, stride_v_token, scale, cross_epsilon, feed_forward_epsilon,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    FEED_FORWARD: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FULL: tl.constexpr,
    CONSTANT_WEIGHTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sample."""
    tiles = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    feature, key = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    inside = feature < WIDTH
    mask = (row < queries)[:, None] & inside[None, :]
    place = row.to(tl.int64)[:, None]
    if not CONSTANT_WEIGHTS:
        await_earlier_kernels(EARLY)
    out_tile = _weight_tile(out_weight, feature, feature, WIDTH, WIDTH, WIDTH, FULL)
    bias = _added(out_bias, feature, WIDTH)
    if CONSTANT_WEIGHTS:
        await_earlier_kernels(EARLY)

    base = x + batch * stride_x_batch + place * stride_x_token + feature[None, :]
    stream = tl.load(base, mask=mask, other=0.0).to(tl.float32) + bias
    base = attended + batch * stride_attended_batch + place * stride_attended_token + feature[None, :]
    tile = tl.load(base, mask=mask, other=0.0)
    stream = tl.dot(tile, tl.trans(out_tile), stream, input_precision="ieee")

    normed = _norm(stream, inside, cross_epsilon, WIDTH).to(tile.dtype)
    target = out + (batch * queries + place) * WIDTH + feature[None, :]
    tl.store(target, stream.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # other threads of the program may load it again
    stream = _cross_attention(
        target, mask, normed, query_weight, query_bias, cross_weight,
        k + batch * stride_k_batch, v + batch * stride_v_batch, key, keys, scale, stride_k_token, stride_v_token,
        WIDTH, BLOCK, HEADS, DIM, FULL,
    )  # fmt: skip

    stream += _added(cross_bias, feature, WIDTH)
    normed = _norm(stream, inside, feed_forward_epsilon, WIDTH).to(tile.dtype)
    stream = _feed_forward(
        stream, normed, expand_weight, expand_bias, contract_weight, WIDTH, BLOCK, FEED_FORWARD, HIDDEN, FULL
    )
    stream += _added(contract_bias, feature, WIDTH)
    tl.store(target, stream.to(out.dtype.element_ty), mask=mask)


def tail(
    tokens: Tensor,
    attended: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    cross_epsilon: float,
    feed_forward_epsilon: float,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_arguments(tokens, attended, k, v, weights, config)
    batch, queries, width = tokens.shape
    keys, heads, dim = k.shape[1:]
    out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    tokens, attended = (x if x.stride(2) == 1 else x.contiguous() for x in (tokens, attended))
    k, v = (x if x.stride()[2:] == (dim, 1) else x.contiguous() for x in (k, v))  # heads side by side
    block, hidden = max(16, triton.next_power_of_2(width)), weights[6].shape[0]
    tile = TailConfig(*config) if config else pinned(tokens.element_size())
    early = launches_early(tokens)
    with on_device(tokens):
        decoder_tail_kernel[(batch * triton.cdiv(queries, tile.rows),)](
            tokens, attended, k, v, out, *weights, queries, keys,
            *tokens.stride()[:2], *attended.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            scale, cross_epsilon, feed_forward_epsilon,
            WIDTH=width, BLOCK=block, HEADS=heads, DIM=dim, FEED_FORWARD=hidden, HIDDEN=tile.hidden, ROWS=tile.rows,
            KEYS=max(16, triton.next_power_of_2(keys)), FULL=width == block and hidden % tile.hidden == 0,
            CONSTANT_WEIGHTS=constant_weights, EARLY=early,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(early),
        )  # fmt: skip
    return out
