"""The forward pass of the batch norm in Triton: moments, then the result and the bits of its ReLU."""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
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
    Shared,
    bits_of_channels,
    channels_of,
    last_of_its_channels,
    load,
    load_four,
    load_sums,
    place,
    shared_out,
    store_bits,
)
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, on_device

TILES = 8
"""Of one tensor under way at a time."""


@triton.jit
def _add_group_moments(first, second, sums, start, near, rows, each, PARTS: tl.constexpr):
    """Adds what some groups found to sums of means off `near`, times their rows, and of squares off it."""
    mean, squares, inside = sums
    group = start + tl.arange(0, PARTS)
    count = tl.minimum(rows - group * each, each).to(tl.float32)[:, None]
    apart = tl.where(inside, mean - near[None, :], 0.0)
    return first + count * apart, second + squares + count * apart * apart


@triton.jit
def _join_moments(partials, groups, channels, rows, each, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean and the variance of all groups' rows: `each` of all groups but the last."""
    near = tl.load(partials + c, mask=c < channels, other=0.0, cache_modifier=".cg")  # other groups' are not far
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    these = load_sums(partials, 0, groups, channels, c, PARTS)
    for start in range(0, groups, 2 * PARTS):
        those = load_sums(partials, start + PARTS, groups, channels, c, PARTS)
        first, second = _add_group_moments(first, second, these, start, near, rows, each, PARTS)
        these = load_sums(partials, start + 2 * PARTS, groups, channels, c, PARTS)
        first, second = _add_group_moments(first, second, those, start + PARTS, near, rows, each, PARTS)
    apart = tl.sum(first, 0) / rows
    variance = tl.sum(second, 0) / rows - apart * apart
    return near + apart, tl.where(variance < 0.0, 0.0, variance)  # not tl.maximum: what is not a number stays so


@triton.jit(do_not_specialize=SIZES)
def batch_norm_moments_kernel(
    x, partials, counters, mean, variance, running_mean, running_var, batches, rows, channels, groups, each, momentum,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    RUNNING: tl.constexpr, COUNTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The mean and the variance of all channels. Where RUNNING they go into the running averages, too.

    Each group of rows has a mean of its own and the sum of the squares of what its rows are off it. Numbers are summed
    less the mean of the group's first tile, so that their squares keep their digits.
    """
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (load(x, begin + i * ROWS, end, channels, c, ROWS),)  # noqa: RUF005 - Triton has no other way
    near = tl.sum(tiles[0].to(tl.float32), 0) / tl.minimum(end - begin, ROWS).to(tl.float32)
    first = tl.zeros([ROWS, CHANNELS], tl.float32)
    second = tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(begin, end, TILES * ROWS):
        following = ()
        for i in tl.static_range(TILES):
            _, inside = place(row + i * ROWS, end, channels, c, ROWS)
            value = tl.where(inside, tiles[i].to(tl.float32) - near[None, :], 0.0)
            first += value
            second += value * value
            tile = load(x, row + (i + TILES) * ROWS, end, channels, c, ROWS)
            following = following + (tile,)  # noqa: RUF005
        tiles = following
    count = (end - begin).to(tl.float32)
    apart = tl.sum(first, 0) / count
    squares = tl.sum(second, 0) - count * apart * apart
    if last_of_its_channels(counters, partials, near + apart, squares, groups, channels, c):
        middle, spread = _join_moments(partials, groups, channels, rows, each, c, PARTS, CHANNELS)
        known = c < channels
        tl.store(mean + c, middle, mask=known)
        tl.store(variance + c, spread, mask=known)
        if RUNNING:
            before = tl.load(running_mean + c, mask=known, other=0.0)
            tl.store(running_mean + c, before + momentum * (middle - before), mask=known)
            before = tl.load(running_var + c, mask=known, other=0.0)
            unbiased = spread * (rows / (rows - 1.0))
            tl.store(running_var + c, before + momentum * (unbiased - before), mask=known)
        if COUNTED:  # noqa: SIM102 - one is known when it is compiled
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(batches) + 1)


@triton.jit
def store_result(
    y, out, bits, row, end, channels, c,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A tile behind its ReLU. What that lets through is seen of what is stored: rounding may make it 0."""
    offset, inside = place(row, end, channels, c, ROWS)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    y = y.to(out.dtype.element_ty)
    tl.store(out + offset, y, mask=inside)
    if BITS:
        store_bits(bits, y.to(tl.float32) > 0.0, row, end, ROWS, CHANNELS)


@triton.jit
def _normalize(
    these, those, out, bits, row, end, channels, c, middle, scale, low,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Four tiles of the result."""
    for i in tl.static_range(4):
        y = (these[i].to(tl.float32) - middle) * scale + low
        if RESIDUAL:
            y += those[i].to(tl.float32)
        store_result(y, out, bits, row + i * ROWS, end, channels, c, ROWS, CHANNELS, RELU, BITS)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_kernel(
    x, residual, weight, bias, mean, variance, out, bits, rows, channels, groups, each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The norm, + residual, and its ReLU; where BITS what that lets through, too.

    What earlier kernels than the last one wrote is read before that has ended: the first tiles are then there when the
    moments are.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    if BITS:
        bits = bits_of_channels(bits, rows, CHANNELS)
    row = begin + (tl.cdiv(end - begin, 4 * ROWS) - 1) * 4 * ROWS
    these = load_four(x, row, end, channels, c, ROWS)
    those = load_four(residual, row, end, channels, c, ROWS) if RESIDUAL else these
    await_earlier_kernels(EARLY)
    middle, _, scale, low = channels_of(mean, variance, weight, bias, channels, c, epsilon)
    _normalize(these, those, out, bits, row, end, channels, c, middle, scale, low, ROWS, CHANNELS, RESIDUAL, RELU, BITS)
    while row > begin:
        row -= 4 * ROWS
        these = load_four(x, row, end, channels, c, ROWS)
        those = load_four(residual, row, end, channels, c, ROWS) if RESIDUAL else these
        _normalize(
            these, those, out, bits, row, end, channels, c, middle, scale, low, ROWS, CHANNELS, RESIDUAL, RELU, BITS
        )


def launch_moments(
    shared: Shared, x: Tensor, mean: Tensor, variance: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float,
) -> None:  # fmt: skip
    """Of one batch norm."""
    batch_norm_moments_kernel[shared.grid](
        x, shared.partials, shared.counters, mean, variance, running_mean, running_var, batches, *shared.sizes,
        momentum, TILES=TILES, PARTS=shared.parts, RUNNING=running_mean is not None, COUNTED=batches is not None,
        **shared.options,
    )  # fmt: skip


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, counters: Tensor | None, momentum: float, epsilon: float,
    relu: bool, bits: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_forward(x, residual, weight, bias, running_mean, running_var, batches, counters)
    out, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    let = x.new_empty(ops.bits_shape(x) if bits else 0, dtype=torch.uint8)
    shared = shared_out(x, counters, config)
    with on_device(x):
        launch_moments(shared, x, mean, variance, running_mean, running_var, batches, momentum)
        batch_norm_kernel[shared.grid](
            x, residual, weight, bias, mean, variance, out, let if bits else None, *shared.sizes, epsilon,
            RESIDUAL=residual is not None, RELU=relu, BITS=bits, **shared.options,
        )  # fmt: skip
    return out, mean, variance, let
