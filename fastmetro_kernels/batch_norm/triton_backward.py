"""The backward pass of the batch norm in Triton: sums, then the gradient of x."""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.batch_norm import ops
from fastmetro_kernels.batch_norm.triton_shared import (
    SIZES,
    bits_of_channels,
    channels_of,
    last_of_its_channels,
    load,
    load_bits,
    load_four,
    load_sums,
    place,
    shared_out,
    unpack_bits,
)
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, on_device

TILES, TILES_WITH_MORE = 4, 2
"""Of two or three tensors under way at a time."""


@triton.jit
def _add_sums(partials, groups, channels, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both numbers of all groups."""
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    these = load_sums(partials, 0, groups, channels, c, PARTS)
    for start in range(0, groups, 2 * PARTS):
        those = load_sums(partials, start + PARTS, groups, channels, c, PARTS)
        first, second = first + these[0], second + these[1]
        these = load_sums(partials, start + 2 * PARTS, groups, channels, c, PARTS)
        first, second = first + those[0], second + those[1]
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _through(g, value, scale, low):
    """The gradient in front of a ReLU that had no residual in front of it."""
    return tl.where(value * scale + low > 0.0, g, 0.0)


@triton.jit
def _load_given(
    grad, more, x, bits, row, end, channels, c,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, MORE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of a tile: the gradient, x, the second gradient, and what the ReLU let through. The first where there is no such
    thing."""
    g = load(grad, row, end, channels, c, ROWS)
    value = load(x, row, end, channels, c, ROWS)
    other = load(more, row, end, channels, c, ROWS) if MORE else g
    let = load_bits(bits, row, end, ROWS, CHANNELS) if BITS else g
    return g, value, other, let


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_sums_kernel(
    grad, more, x, bits, weight, bias, mean, variance, partials, counters, grad_weight, grad_bias, behind,
    rows, channels, groups, each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    MORE: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr, BEHIND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradients of the channels' biases and weights: sums of the gradient in front of the ReLU, and of it times what is
    normalised. That gradient itself, too, where BEHIND. What the ReLU let through BITS tell, else x."""
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    middle, inverse, scale, low = channels_of(mean, variance, weight, bias, channels, c, epsilon)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    if BITS:
        bits = bits_of_channels(bits, rows, CHANNELS)
    first = tl.zeros([ROWS, CHANNELS], tl.float32)
    second = tl.zeros([ROWS, CHANNELS], tl.float32)
    tiles = ()
    for i in tl.static_range(TILES):
        tile = _load_given(grad, more, x, bits, begin + i * ROWS, end, channels, c, ROWS, CHANNELS, MORE, BITS)
        tiles = tiles + (tile,)  # noqa: RUF005 - Triton has no other way
    for row in range(begin, end, TILES * ROWS):
        following = ()
        for i in tl.static_range(TILES):
            g, value, other, let = tiles[i]
            offset, inside = place(row + i * ROWS, end, channels, c, ROWS)
            g = g.to(tl.float32)
            if MORE:
                g += other.to(tl.float32)
            value = value.to(tl.float32) - middle
            if BITS:
                g = tl.where(unpack_bits(let, ROWS, CHANNELS), g, 0.0)
            elif RELU:
                g = _through(g, value, scale, low)
            if BEHIND:
                tl.store(behind + offset, g.to(behind.dtype.element_ty), mask=inside)
            first += g
            second += tl.where(inside, g * value, 0.0)
            below = row + (i + TILES) * ROWS
            tile = _load_given(grad, more, x, bits, below, end, channels, c, ROWS, CHANNELS, MORE, BITS)
            following = following + (tile,)  # noqa: RUF005
        tiles = following
    if last_of_its_channels(counters, partials, tl.sum(first, 0), tl.sum(second, 0), groups, channels, c):
        all_of_it, times = _add_sums(partials, groups, channels, c, PARTS, CHANNELS)
        tl.store(grad_bias + c, all_of_it, mask=c < channels)
        tl.store(grad_weight + c, times * inverse, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_kernel(
    grad, more, x, weight, bias, mean, variance, grad_weight, grad_bias, grad_x, rows, channels, groups, each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, MORE: tl.constexpr, RELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient of x. The ReLU, where there still is one, had no residual in front of it."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    row = begin + (tl.cdiv(end - begin, 4 * ROWS) - 1) * 4 * ROWS
    values = load_four(x, row, end, channels, c, ROWS)  # as in the forward kernel; `grad` may be the last kernel's
    await_earlier_kernels(EARLY)
    middle, inverse, scale, low = channels_of(mean, variance, weight, bias, channels, c, epsilon)
    common = (tl.load(grad_bias + c, mask=known, other=0.0) / rows)[None, :]
    slope = (tl.load(grad_weight + c, mask=known, other=0.0) * inverse / rows)[None, :]
    while row >= begin:
        gradients = load_four(grad, row, end, channels, c, ROWS)
        if MORE:
            others = load_four(more, row, end, channels, c, ROWS)
        for i in tl.static_range(4):
            offset, inside = place(row + i * ROWS, end, channels, c, ROWS)
            g = gradients[i].to(tl.float32)
            if MORE:
                g += others[i].to(tl.float32)
            value = values[i].to(tl.float32) - middle
            if RELU:
                g = _through(g, value, scale, low)
            g = (g - common - value * slope) * scale
            tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), mask=inside)
        row -= 4 * ROWS
        if row >= begin:
            values = load_four(x, row, end, channels, c, ROWS)


def backward(
    grad: Tensor, more: Tensor | None, x: Tensor, bits: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, counters: Tensor | None, epsilon: float, relu: bool, behind: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_backward(grad, more, x, bits, weight, bias, mean, variance, counters, relu, behind)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    before = torch.empty_like(x) if behind else x.new_empty(0)
    shared = shared_out(x, counters, config, backward=True)
    with on_device(x):
        batch_norm_backward_sums_kernel[shared.grid](
            grad, more, x, bits, weight, bias, mean, variance, shared.partials, shared.counters,
            grad_weight, grad_bias, before if behind else None, *shared.sizes, epsilon,
            TILES=TILES if more is None else TILES_WITH_MORE, PARTS=shared.parts,
            MORE=more is not None, RELU=relu, BITS=bits is not None, BEHIND=behind, **shared.options,
        )  # fmt: skip
        # The gradient in front of the ReLU is there where it was asked for, and read instead of what it is made of.
        again = (before, None, False) if behind else (grad, more, relu)
        batch_norm_backward_kernel[shared.grid](
            again[0], again[1], x, weight, bias, mean, variance, grad_weight, grad_bias, grad_x, *shared.sizes, epsilon,
            MORE=again[1] is not None, RELU=again[2], **shared.options,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, before
