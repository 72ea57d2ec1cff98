"""The batch norms of a block and of its shortcut together, forward and backward, in Triton.

Forward the moments of both, then the result; backward the sums of both, then both gradients. The shortcut's norm is
written nowhere, and the gradient in front of the ReLU is written once and read once.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.batch_norm import joint_ops, ops
from fastmetro_kernels.batch_norm.triton_forward import launch_moments, store_result
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

TILES = 2
"""Of three or four tensors under way at a time: with more only one program would fit on a multiprocessor."""


@triton.jit(do_not_specialize=SIZES)
def batch_norm_joint_kernel(
    x, residual, weight, bias, mean, variance, residual_weight, residual_bias, residual_mean, residual_variance,
    out, bits, rows, channels, groups, each, epsilon, residual_epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sum of both norms, and its ReLU; where BITS what that lets through, too."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    if BITS:
        bits = bits_of_channels(bits, rows, CHANNELS)
    row = begin + (tl.cdiv(end - begin, 4 * ROWS) - 1) * 4 * ROWS
    these = load_four(x, row, end, channels, c, ROWS)  # as in the kernel of one norm
    those = load_four(residual, row, end, channels, c, ROWS)
    await_earlier_kernels(EARLY)
    middle, _, scale, low = channels_of(mean, variance, weight, bias, channels, c, epsilon)
    other_middle, _, other_scale, other_low = channels_of(
        residual_mean, residual_variance, residual_weight, residual_bias, channels, c, residual_epsilon
    )
    low += other_low
    while row >= begin:
        for i in tl.static_range(4):
            y = (these[i].to(tl.float32) - middle) * scale + low
            y += (those[i].to(tl.float32) - other_middle) * other_scale
            store_result(y, out, bits, row + i * ROWS, end, channels, c, ROWS, CHANNELS, RELU, BITS)
        row -= 4 * ROWS
        if row >= begin:
            these = load_four(x, row, end, channels, c, ROWS)
            those = load_four(residual, row, end, channels, c, ROWS)


@triton.jit
def _load_two(base, row, end, channels, c, ROWS: tl.constexpr):
    """Two tiles, one behind the other: of three or four tensors, as many bytes as elsewhere four tiles are."""
    return load(base, row, end, channels, c, ROWS), load(base, row + ROWS, end, channels, c, ROWS)


@triton.jit
def _add_three_sums(partials, groups, channels, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """The numbers of all groups."""
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    third = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, groups, PARTS):
        one, other, inside = load_sums(partials, start, groups, channels, c, PARTS)
        offset, _ = place(start + 2 * groups, 3 * groups, channels, c, PARTS)
        first += one
        second += other
        third += tl.load(partials + offset, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def _mean_and_inverse(mean, variance, channels, c, epsilon):
    """Of these channels the mean, and one over the deviation."""
    known = c < channels
    inverse = tl.rsqrt(tl.load(variance + c, mask=known, other=1.0) + epsilon)
    return tl.load(mean + c, mask=known, other=0.0)[None, :], inverse


@triton.jit
def _load_given(
    grad, more, x, residual, bits, row, end, channels, c,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, MORE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of a tile: the gradient, x, the residual, the second gradient, and what the ReLU let through. The first where
    there is no such thing."""
    g = load(grad, row, end, channels, c, ROWS)
    value = load(x, row, end, channels, c, ROWS)
    other_value = load(residual, row, end, channels, c, ROWS)
    other = load(more, row, end, channels, c, ROWS) if MORE else g
    let = load_bits(bits, row, end, ROWS, CHANNELS) if BITS else g
    return g, value, other_value, other, let


@triton.jit(do_not_specialize=SIZES)
def batch_norm_joint_sums_kernel(
    grad, more, x, residual, bits, mean, variance, residual_mean, residual_variance, partials, counters,
    grad_weight, grad_bias, grad_residual_weight, grad_residual_bias, behind,
    rows, channels, groups, each, epsilon, residual_epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    MORE: tl.constexpr, BITS: tl.constexpr, BEHIND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradients of both norms' biases, which are the same, and weights. The gradient in front of the ReLU, too, where
    BEHIND. What the ReLU let through BITS tell; else there is none."""
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    middle, inverse = _mean_and_inverse(mean, variance, channels, c, epsilon)
    other_middle, other_inverse = _mean_and_inverse(residual_mean, residual_variance, channels, c, residual_epsilon)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    if BITS:
        bits = bits_of_channels(bits, rows, CHANNELS)
    first = tl.zeros([ROWS, CHANNELS], tl.float32)
    second = tl.zeros([ROWS, CHANNELS], tl.float32)
    third = tl.zeros([ROWS, CHANNELS], tl.float32)
    tiles = ()
    for i in tl.static_range(TILES):
        tile = _load_given(
            grad, more, x, residual, bits, begin + i * ROWS, end, channels, c, ROWS, CHANNELS, MORE, BITS
        )
        tiles = tiles + (tile,)  # noqa: RUF005 - Triton has no other way
    for row in range(begin, end, TILES * ROWS):
        following = ()
        for i in tl.static_range(TILES):
            g, value, other_value, other, let = tiles[i]
            offset, inside = place(row + i * ROWS, end, channels, c, ROWS)
            g = g.to(tl.float32)
            if MORE:
                g += other.to(tl.float32)
            if BITS:
                g = tl.where(unpack_bits(let, ROWS, CHANNELS), g, 0.0)
            if BEHIND:
                tl.store(behind + offset, g.to(behind.dtype.element_ty), mask=inside)
            first += g
            second += tl.where(inside, g * (value.to(tl.float32) - middle), 0.0)
            third += tl.where(inside, g * (other_value.to(tl.float32) - other_middle), 0.0)
            below = row + (i + TILES) * ROWS
            tile = _load_given(grad, more, x, residual, bits, below, end, channels, c, ROWS, CHANNELS, MORE, BITS)
            following = following + (tile,)  # noqa: RUF005
        tiles = following
    known = c < channels
    tl.store(partials + (2 * groups + tl.program_id(1)) * channels + c, tl.sum(third, 0), mask=known)
    if last_of_its_channels(counters, partials, tl.sum(first, 0), tl.sum(second, 0), groups, channels, c):
        all_of_it, times, other_times = _add_three_sums(partials, groups, channels, c, PARTS, CHANNELS)
        tl.store(grad_bias + c, all_of_it, mask=known)
        tl.store(grad_residual_bias + c, all_of_it, mask=known)
        tl.store(grad_weight + c, times * inverse, mask=known)
        tl.store(grad_residual_weight + c, other_times * other_inverse, mask=known)


@triton.jit
def _slope_of(mean, variance, weight, grad_weight, rows, channels, c, epsilon):
    """Of these channels the mean, what x - mean is multiplied by, and what the gradient is."""
    known = c < channels
    middle, inverse = _mean_and_inverse(mean, variance, channels, c, epsilon)
    slope = tl.load(grad_weight + c, mask=known, other=0.0) * inverse / rows
    return middle, slope[None, :], (tl.load(weight + c, mask=known, other=0.0) * inverse)[None, :]


@triton.jit(do_not_specialize=SIZES)
def batch_norm_joint_backward_kernel(
    grad, x, residual, weight, mean, variance, residual_weight, residual_mean, residual_variance,
    grad_weight, grad_bias, grad_residual_weight, grad_x, grad_residual,
    rows, channels, groups, each, epsilon, residual_epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradients of x and of residual; `grad` is that in front of the ReLU."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    row = begin + (tl.cdiv(end - begin, 2 * ROWS) - 1) * 2 * ROWS
    values = _load_two(x, row, end, channels, c, ROWS)  # as in the kernel of one norm
    other_values = _load_two(residual, row, end, channels, c, ROWS)
    await_earlier_kernels(EARLY)
    middle, slope, scale = _slope_of(mean, variance, weight, grad_weight, rows, channels, c, epsilon)
    other_middle, other_slope, other_scale = _slope_of(
        residual_mean, residual_variance, residual_weight, grad_residual_weight, rows, channels, c, residual_epsilon
    )
    common = (tl.load(grad_bias + c, mask=c < channels, other=0.0) / rows)[None, :]
    while row >= begin:
        gradients = _load_two(grad, row, end, channels, c, ROWS)
        for i in tl.static_range(2):
            offset, inside = place(row + i * ROWS, end, channels, c, ROWS)
            g = gradients[i].to(tl.float32) - common
            found = (g - (values[i].to(tl.float32) - middle) * slope) * scale
            tl.store(grad_x + offset, found.to(grad_x.dtype.element_ty), mask=inside)
            found = (g - (other_values[i].to(tl.float32) - other_middle) * other_slope) * other_scale
            tl.store(grad_residual + offset, found.to(grad_residual.dtype.element_ty), mask=inside)
        row -= 2 * ROWS
        if row >= begin:
            values = _load_two(x, row, end, channels, c, ROWS)
            other_values = _load_two(residual, row, end, channels, c, ROWS)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, residual_weight: Tensor, residual_bias: Tensor,
    running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float,
    residual_running_mean: Tensor | None, residual_running_var: Tensor | None, residual_batches: Tensor | None,
    residual_momentum: float, counters: Tensor | None, epsilon: float, residual_epsilon: float, relu: bool, bits: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the three kernels; arguments as in ``joint_ops.py``."""
    own = running_mean, running_var, batches
    others = residual_running_mean, residual_running_var, residual_batches
    ops.check_tile(config)
    joint_ops.check_forward(x, residual, weight, bias, residual_weight, residual_bias, own, others, counters)
    out, let = torch.empty_like(x), x.new_empty(ops.bits_shape(x) if bits else 0, dtype=torch.uint8)
    mean, variance, other_mean, other_variance = (torch.empty_like(weight) for _ in range(4))
    shared = shared_out(x, counters, config)
    with on_device(x):
        launch_moments(shared, x, mean, variance, *own, momentum)
        launch_moments(shared, residual, other_mean, other_variance, *others, residual_momentum)
        batch_norm_joint_kernel[shared.grid](
            x, residual, weight, bias, mean, variance, residual_weight, residual_bias, other_mean, other_variance,
            out, let if bits else None, *shared.sizes, epsilon, residual_epsilon,
            RELU=relu, BITS=bits, **shared.options,
        )  # fmt: skip
    return out, mean, variance, other_mean, other_variance, let


def backward(
    grad: Tensor, more: Tensor | None, x: Tensor, residual: Tensor, bits: Tensor | None, weight: Tensor, mean: Tensor,
    variance: Tensor, residual_weight: Tensor, residual_mean: Tensor, residual_variance: Tensor,
    counters: Tensor | None, epsilon: float, residual_epsilon: float, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``joint_ops.py``."""
    own, others = (mean, variance), (residual_mean, residual_variance)
    ops.check_tile(config)
    joint_ops.check_backward(grad, more, x, residual, bits, weight, *own, residual_weight, *others, counters)
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x)
    grad_weight, grad_bias, other_grad_weight, other_grad_bias = (torch.empty_like(weight) for _ in range(4))
    behind = torch.empty_like(x) if bits is not None or more is not None else None
    shared = shared_out(x, counters, config, sums=3, backward=True)
    with on_device(x):
        batch_norm_joint_sums_kernel[shared.grid](
            grad, more, x, residual, bits, *own, *others, shared.partials, shared.counters,
            grad_weight, grad_bias, other_grad_weight, other_grad_bias, behind, *shared.sizes, epsilon,
            residual_epsilon, TILES=TILES, PARTS=shared.parts,
            MORE=more is not None, BITS=bits is not None, BEHIND=behind is not None, **shared.options,
        )  # fmt: skip
        batch_norm_joint_backward_kernel[shared.grid](
            grad if behind is None else behind, x, residual, weight, *own, residual_weight, *others,
            grad_weight, grad_bias, other_grad_weight, grad_x, grad_residual, *shared.sizes, epsilon, residual_epsilon,
            **shared.options,
        )  # fmt: skip
    return grad_x, grad_residual, grad_weight, grad_bias, other_grad_weight, other_grad_bias
