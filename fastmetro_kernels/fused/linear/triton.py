"""The Triton backend of the fused linear layer: CUDA devices, or CPU tensors in Triton's interpreter.

A program makes one tile of the output. It needs whole rows of x, so it can take the moments of the layer norm itself:
in a first pass over its rows, which the second pass then finds in L1. Where the kernel that made x left the moments, it
multiplies x as it is and corrects the sums at the end (`_late_norm`). Where the batch is small, tiles are small, and
what takes time is the chain of products that add to one accumulator: such a tile is cut into shares of the depth, which
different warps take (a batched product) and one sum joins, in a fixed order. Nothing is tuned at run time, and no two
programs write to one place.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.early_launch import (
    await_earlier_kernels,
    launch_options,
    launches_early,
    on_device,
    prefetch_rows,
)
from fastmetro_kernels.fused.linear import ops

_SMALL_TILE = 4096
"""Tiles up to this size load what is added in front of the product; larger ones need the registers meanwhile."""


@triton.jit
def _depth(first, DEPTH: tl.constexpr, SHARES: tl.constexpr):
    """Positions along the depth of a step: [DEPTH], or [SHARES, DEPTH]."""
    if SHARES == 1:
        k = first + tl.arange(0, DEPTH)
    else:
        k = first + tl.arange(0, SHARES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    return k.to(tl.int64)


@triton.jit
def _load_rows(base, k, stride_dim, WIDTH: tl.constexpr, EVEN: tl.constexpr, SHARES: tl.constexpr):
    """Rows at the pointers base [ROWS]: [ROWS, DEPTH] or [SHARES, ROWS, DEPTH], 0 beyond WIDTH."""
    if SHARES == 1:
        pointers = base[:, None] + (k * stride_dim)[None, :]
        inside = (k < WIDTH)[None, :]
    else:
        pointers = base[None, :, None] + (k * stride_dim)[:, None, :]
        inside = (k < WIDTH)[:, None, :]
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _load_weight(base, k, stride_dim, WIDTH: tl.constexpr, EVEN: tl.constexpr, SHARES: tl.constexpr):
    """Rows of the weight at the pointers base [COLUMNS], transposed: [DEPTH, COLUMNS] or [SHARES, DEPTH, COLUMNS]."""
    if SHARES == 1:
        pointers = base[None, :] + (k * stride_dim)[:, None]
        inside = (k < WIDTH)[:, None]
    else:
        pointers = base[None, None, :] + (k * stride_dim)[:, :, None]
        inside = (k < WIDTH)[:, :, None]
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _load_tile(base, row_offsets, column_offsets, mask):
    """What is added to the tile of the output, 0 beyond the edges."""
    return tl.load(base + row_offsets[:, None] + column_offsets[None, :], mask=mask, other=0.0)


@triton.jit
def _spread(row_values, SHARES: tl.constexpr):
    """A number per row, in the axes of a tile of x."""
    return row_values[:, None] if SHARES == 1 else row_values[None, :, None]


@triton.jit
def _sum_rows(tile, SHARES: tl.constexpr):
    """Sums of the rows of a tile of x."""
    return tl.sum(tile, 1) if SHARES == 1 else tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _add_moments(mean, squares, tile, k, first, WIDTH: tl.constexpr, STEP: tl.constexpr, SHARES: tl.constexpr):
    """Mean and sum of squared distances from it, with one more step of the rows (Chan, Golub and LeVeque 1979)."""
    count = tl.minimum(WIDTH - first, STEP).to(tl.float32)
    seen = first * 1.0
    tile = tile.to(tl.float32)
    tile_mean = _sum_rows(tile, SHARES) / count
    inside = (k < WIDTH)[None, :] if SHARES == 1 else (k < WIDTH)[:, None, :]
    centred = tl.where(inside, tile - _spread(tile_mean, SHARES), 0.0)
    tile_squares = _sum_rows(centred * centred, SHARES)
    delta = tile_mean - mean
    share = count / (seen + count)
    return mean + delta * share, squares + tile_squares + delta * delta * (seen * share)


@triton.jit
def _normalized(tile, mean, inverse, dtype: tl.constexpr, SHARES: tl.constexpr):
    return ((tile.to(tl.float32) - _spread(mean, SHARES)) * _spread(inverse, SHARES)).to(dtype)


@triton.jit
def _late_norm(acc, moments_row, weight_sums, epsilon, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Turns products with rows x into those with norm(x): (x W^T - mean * sum(W)) / deviation.

    moments_row points to (count, mean, squared distances from it) of a row, for PARTS parts of the features, which are
    merged exactly (Chan, Golub and LeVeque 1979).
    """
    PADDED: tl.constexpr = triton.next_power_of_2(PARTS)
    part = tl.arange(0, PADDED)
    pointers = moments_row[:, None] + 3 * part[None, :]
    inside = (part < PARTS)[None, :]
    count = tl.load(pointers, mask=inside, other=0.0)
    part_mean = tl.load(pointers + 1, mask=inside, other=0.0)
    squares = tl.load(pointers + 2, mask=inside, other=0.0)
    mean = tl.sum(count * part_mean, 1) / WIDTH
    delta = part_mean - mean[:, None]
    variance = tl.sum(squares + count * delta * delta, 1) / WIDTH
    return (acc - mean[:, None] * weight_sums[None, :]) * tl.rsqrt(variance + epsilon)[:, None]


@triton.jit
def _multiply(tile, weight_tile, acc, COLUMNS: tl.constexpr):
    """acc + tile @ weight_tile. Fewer than 16 columns, which tensor cores do not have, are multiplied and summed."""
    if COLUMNS < 16:
        products = tile.to(tl.float32)[:, :, None] * weight_tile.to(tl.float32)[None, :, :]
        acc += tl.sum(products, 1)
    else:
        acc = tl.dot(tile.to(weight_tile.dtype), weight_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _product_in_steps(
    x_base, weight_base, stride_x_dim, stride_weight_dim, epsilon,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SHARES: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """norm(x) @ weight.T of one tile, float32, step by step along the depth."""
    STEP: tl.constexpr = DEPTH * SHARES
    EVEN: tl.constexpr = WIDTH % STEP == 0
    dtype: tl.constexpr = weight_base.dtype.element_ty
    acc = tl.zeros((ROWS, COLUMNS) if SHARES == 1 else (SHARES, ROWS, COLUMNS), tl.float32)
    if NORMALIZE:
        mean = tl.zeros((ROWS,), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for first in range(0, WIDTH, STEP):
            k = _depth(first, DEPTH, SHARES)
            tile = _load_rows(x_base, k, stride_x_dim, WIDTH, EVEN, SHARES)
            mean, squares = _add_moments(mean, squares, tile, k, first, WIDTH, STEP, SHARES)
        inverse = tl.rsqrt(squares / WIDTH + epsilon)
    for first in range(0, WIDTH, STEP):
        k = _depth(first, DEPTH, SHARES)
        tile = _load_rows(x_base, k, stride_x_dim, WIDTH, EVEN, SHARES)
        weight_step = _load_weight(weight_base, k, stride_weight_dim, WIDTH, EVEN, SHARES)
        if NORMALIZE:
            tile = _normalized(tile, mean, inverse, dtype, SHARES)
        acc = _multiply(tile, weight_step, acc, COLUMNS)
    return acc if SHARES == 1 else tl.sum(acc, 0)


@triton.jit
def _product_at_once(
    x_base, weight_tile, stride_x_dim, epsilon,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SHARES: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The same where one step is all, so that weight_tile is the whole weight of the tile."""
    STEP: tl.constexpr = DEPTH * SHARES
    k = _depth(0, DEPTH, SHARES)
    tile = _load_rows(x_base, k, stride_x_dim, WIDTH, WIDTH == STEP, SHARES)
    if NORMALIZE:
        zero = tl.zeros((ROWS,), tl.float32)
        mean, squares = _add_moments(zero, zero, tile, k, 0, WIDTH, STEP, SHARES)
        tile = _normalized(tile, mean, tl.rsqrt(squares / WIDTH + epsilon), weight_tile.dtype, SHARES)
    acc = tl.zeros((ROWS, COLUMNS) if SHARES == 1 else (SHARES, ROWS, COLUMNS), tl.float32)
    acc = _multiply(tile, weight_tile, acc, COLUMNS)
    return acc if SHARES == 1 else tl.sum(acc, 0)


@triton.jit
def _product(
    x_base, weight_base, weight_tile, stride_x_dim, stride_weight_dim, moments_row, sums, epsilon,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SHARES: tl.constexpr,
    PARTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """norm(x) @ weight.T of one tile, whichever way the norm is taken."""
    if weight_tile is not None:
        result = _product_at_once(
            x_base, weight_tile, stride_x_dim, epsilon, WIDTH, ROWS, COLUMNS, DEPTH, SHARES, NORMALIZE
        )
    else:
        result = _product_in_steps(
            x_base, weight_base, stride_x_dim, stride_weight_dim, epsilon,
            WIDTH, ROWS, COLUMNS, DEPTH, SHARES, NORMALIZE,
        )  # fmt: skip
    if PARTS > 0:
        result = _late_norm(result, moments_row, sums, epsilon, WIDTH, PARTS)
    return result


@triton.jit
def _put_leading(result, leading_base, place, stride_token, columns, mask, LEADING: tl.constexpr):
    """The rows whose place in their sample is below LEADING, copied."""
    leads = place < LEADING
    row = tl.minimum(place, LEADING - 1).to(tl.int64) * stride_token
    copied = tl.load(leading_base[:, None] + row[:, None] + columns[None, :], mask=mask & leads[:, None], other=0.0)
    return tl.where(leads[:, None], copied.to(tl.float32), result)


@triton.jit
def _store_moments(moments_out, stored, mask, row, rows, column, columns, features, COLUMNS: tl.constexpr):
    """Count, mean and squared distances from it of the tile's rows; `column` of `columns` tiles."""
    values = tl.where(mask, stored.to(tl.float32), 0.0)
    count = tl.minimum(features - column * COLUMNS, COLUMNS).to(tl.float32)
    mean = tl.sum(values, 1) / count
    centred = tl.where(mask, values - mean[:, None], 0.0)
    target = moments_out + (row.to(tl.int64) * columns + column) * 3
    tl.store(target, tl.zeros_like(mean) + count, mask=row < rows)
    tl.store(target + 1, mean, mask=row < rows)
    tl.store(target + 2, tl.sum(centred * centred, 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def fused_linear_kernel(
    x, weight, bias, residual, leading, moments, weight_sums, out, moments_out,
    rows, tokens, features,
    stride_x_batch, stride_x_token, stride_x_dim, stride_weight_feature, stride_weight_dim,
    stride_bias_token, stride_bias_feature, stride_residual_batch, stride_residual_token, stride_residual_feature,
    stride_leading_batch, stride_leading_token, stride_leading_feature, stride_moments_batch, stride_moments_token,
    epsilon,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SHARES: tl.constexpr,
    LEADING: tl.constexpr, PARTS: tl.constexpr, NORMALIZE: tl.constexpr, RELU: tl.constexpr,
    TOKEN_BIAS: tl.constexpr, SMALL: tl.constexpr, CONSTANT_WEIGHTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of the output; columns run fastest, so that programs at a time share rows of x in L2.

    rows counts the output's, of which the first LEADING of each sample are copied. NORMALIZE: a layer norm without
    given moments.
    """
    columns = tl.cdiv(features, COLUMNS)
    program = tl.program_id(0)
    column = program % columns
    row = program // columns * ROWS + tl.arange(0, ROWS)
    feature = column * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    # In the loop over the depth, places beyond the edges repeat the last row and feature, so that loads need no mask.
    near_row, near_feature = tl.minimum(row, rows - 1), tl.minimum(feature, features - 1).to(tl.int64)
    feature = feature.to(tl.int64)
    batch, place = (near_row // (tokens + LEADING)).to(tl.int64), near_row % (tokens + LEADING)
    token = tl.maximum(place - LEADING, 0).to(tl.int64)
    x_base = x + batch * stride_x_batch + token * stride_x_token
    weight_base = weight + near_feature * stride_weight_feature

    if not CONSTANT_WEIGHTS:
        await_earlier_kernels(EARLY)
    weight_tile = None
    if WIDTH <= DEPTH * SHARES:
        k = _depth(0, DEPTH, SHARES)
        EVEN: tl.constexpr = WIDTH == DEPTH * SHARES
        weight_tile = _load_weight(weight_base, k, stride_weight_dim, WIDTH, EVEN, SHARES)
    elif CONSTANT_WEIGHTS and EARLY:
        prefetch_rows(weight_base, stride_weight_dim, program < columns, WIDTH)
    if bias is not None:
        if not TOKEN_BIAS:
            added = tl.load(bias + feature * stride_bias_feature, mask=feature < features, other=0.0)[None, :]
        elif SMALL:
            added = _load_tile(bias, token * stride_bias_token, feature * stride_bias_feature, mask)
    moments_row, sums = None, None
    if PARTS > 0:
        moments_row = moments + batch * stride_moments_batch + token * stride_moments_token
        sums = tl.load(weight_sums + near_feature)
    if CONSTANT_WEIGHTS:
        await_earlier_kernels(EARLY)
    if residual is not None:
        residual_row = batch * stride_residual_batch + token * stride_residual_token
        if SMALL:
            kept = _load_tile(residual, residual_row, feature * stride_residual_feature, mask)

    result = _product(
        x_base, weight_base, weight_tile, stride_x_dim, stride_weight_dim, moments_row, sums, epsilon,
        WIDTH, ROWS, COLUMNS, DEPTH, SHARES, PARTS, NORMALIZE,
    )  # fmt: skip
    if bias is not None:
        if TOKEN_BIAS and not SMALL:
            added = _load_tile(bias, token * stride_bias_token, feature * stride_bias_feature, mask)
        result += added.to(tl.float32)
    if RELU:
        result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if residual is not None:
        if not SMALL:
            kept = _load_tile(residual, residual_row, feature * stride_residual_feature, mask)
        result += kept.to(tl.float32)
    if LEADING > 0:
        from_leading = leading + batch * stride_leading_batch
        result = _put_leading(
            result, from_leading, place, stride_leading_token, feature * stride_leading_feature, mask, LEADING
        )
    stored = result.to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * features + feature[None, :], stored, mask=mask)
    if moments_out is not None:
        _store_moments(moments_out, stored, mask, row, rows, column, columns, features, COLUMNS)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
    moments: Tensor | None,
    weight_sums: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    give_moments: bool,
    constant_weights: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_arguments(x, weight, bias, residual, leading, normalize, moments, weight_sums, config)
    batch, tokens, width = x.shape
    features, more = weight.shape[0], 0 if leading is None else leading.shape[1]
    tile = ops.chosen_tile(x, weight, more, config)
    rows, columns = batch * (tokens + more), triton.cdiv(features, tile.columns)
    out, moments_out = ops.outputs(x, weight, more, out_dtype, columns if give_moments else 0)
    if out.numel() == 0:
        return out, moments_out
    early = launches_early(x)
    bias_strides = (0, 0) if bias is None else bias.stride() if bias.dim() == 2 else (0, bias.stride(0))
    with on_device(x):
        fused_linear_kernel[(triton.cdiv(rows, tile.rows) * columns,)](
            x, weight, bias, residual, leading, moments, weight_sums, out, moments_out if give_moments else None,
            rows, tokens, features,
            *x.stride(), *weight.stride(), *bias_strides, *_strides(residual), *_strides(leading),
            *((0, 0) if moments is None else moments.stride()[:2]),
            0.0 if normalize is None else normalize,
            WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, SHARES=tile.shares,
            LEADING=more, PARTS=0 if moments is None else moments.shape[2],
            NORMALIZE=normalize is not None and moments is None,
            RELU=relu, TOKEN_BIAS=bias is not None and bias.dim() == 2,
            SMALL=tile.rows * tile.columns <= _SMALL_TILE,
            CONSTANT_WEIGHTS=constant_weights, EARLY=early,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(early),
        )  # fmt: skip
    return out, moments_out


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()
