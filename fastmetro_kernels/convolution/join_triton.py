"""The Triton kernels for two added 1 x 1 convolutions: CUDA devices, or CPU tensors in Triton's interpreter.

A product of matrices whose depth has two parts. With a program for every tile one loop takes the steps of both, so that
the second's first ones are on their way while the first's last are multiplied. Where the depth is small, fetching
weights again for every tile is most of what comes out of L2: then a few programs keep the weights of their columns in
shared memory and take tile after tile, and the next tile's pixels are on their way while one is multiplied and stored.

Columns of tiles run fastest, so that programs at a time share pixels in L2; nothing is tuned at run time, and no two
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

from fastmetro_kernels.convolution.join_configs import PLAIN, JoinConfig, padded
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

_SIZES = ["rows", "height", "width", "second_height", "second_width"]


@triton.jit
def _second_row(row, height, width, second_height, second_width, STRIDE: tl.constexpr):
    """The row of the second input that belongs to a row of the output, int64."""
    image, place = row // (height * width), row % (height * width)
    y, x = place // width * STRIDE, place % width * STRIDE
    return (image.to(tl.int64) * second_height + y) * second_width + x


@triton.jit
def _load(pointers, k, width, axis: tl.constexpr, EVEN: tl.constexpr):
    """Channels k of the rows (axis 1) or columns (axis 0) at the pointers, 0 from width on."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.expand_dims(k < width, 1 - axis), other=0.0)


@triton.jit
def _store(acc, added, out, row, column, rows, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, RELU: tl.constexpr):
    """A tile of sums, with what is added to the columns."""
    acc += added[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mask = (row < rows)[:, None]
    if OUTPUTS % COLUMNS != 0:
        mask = mask & (column < OUTPUTS)[None, :]
    target = out + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def convolution_join_kernel(
    x, weight, bias, second, second_weight, out, rows, height, width, second_height, second_width,
    CHANNELS: tl.constexpr, SECOND: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of the output [rows, OUTPUTS]; a row is a position of height x width of an image."""
    ACROSS: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    FIRST_STEPS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    STEPS: tl.constexpr = FIRST_STEPS + (SECOND + DEPTH - 1) // DEPTH
    EVEN: tl.constexpr = CHANNELS % DEPTH == 0 and SECOND % DEPTH == 0
    program = tl.program_id(0)
    row = program // ACROSS * ROWS + tl.arange(0, ROWS)
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    # Places beyond the edges repeat the last row and column, so that loads need no mask for them.
    near_row, near_column = tl.minimum(row, rows - 1), tl.minimum(column, OUTPUTS - 1).to(tl.int64)
    x_rows = x + near_row.to(tl.int64) * CHANNELS
    second_rows = second + _second_row(near_row, height, width, second_height, second_width, STRIDE) * SECOND
    weight_columns, second_columns = weight + near_column * CHANNELS, second_weight + near_column * SECOND

    await_earlier_kernels(EARLY)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        first = step < FIRST_STEPS
        k = tl.where(first, step, step - FIRST_STEPS) * DEPTH + tl.arange(0, DEPTH)
        channels = tl.where(first, CHANNELS, SECOND)
        pixels = _load(tl.where(first, x_rows, second_rows)[:, None] + k[None, :], k, channels, 1, EVEN)
        weights = _load(tl.where(first, weight_columns, second_columns)[None, :] + k[:, None], k, channels, 0, EVEN)
        acc = tl.dot(pixels, weights, acc)
    _store(acc, tl.load(bias + near_column), out, row, column, rows, OUTPUTS, COLUMNS, RELU)


@triton.jit(do_not_specialize=_SIZES)
def convolution_join_keeping_kernel(
    x, weight, bias, second, second_weight, out, rows, height, width, second_height, second_width,
    CHANNELS: tl.constexpr, SECOND: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr, DEPTH: tl.constexpr, SECOND_DEPTH: tl.constexpr,
):  # fmt: skip
    """The same for several tiles of the same columns. DEPTH and SECOND_DEPTH hold all channels."""
    ACROSS: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    EVEN: tl.constexpr = CHANNELS == DEPTH
    SECOND_EVEN: tl.constexpr = SECOND == SECOND_DEPTH
    program = tl.program_id(0)
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    near_column = tl.minimum(column, OUTPUTS - 1)
    k, second_k = tl.arange(0, DEPTH), tl.arange(0, SECOND_DEPTH)

    await_earlier_kernels(EARLY)
    weights = _load(weight + near_column[None, :] * CHANNELS + k[:, None], k, CHANNELS, 0, EVEN)
    second_weights = second_weight + near_column[None, :] * SECOND + second_k[:, None]
    second_weights = _load(second_weights, second_k, SECOND, 0, SECOND_EVEN)
    added = tl.load(bias + near_column)
    for tile in range(program // ACROSS, tl.cdiv(rows, ROWS), tl.num_programs(0) // ACROSS):
        row = tile * ROWS + tl.arange(0, ROWS)
        near_row = tl.minimum(row, rows - 1)
        x_rows = x + near_row.to(tl.int64) * CHANNELS
        second_rows = second + _second_row(near_row, height, width, second_height, second_width, STRIDE) * SECOND
        acc = tl.dot(_load(x_rows[:, None] + k[None, :], k, CHANNELS, 1, EVEN), weights)
        more = _load(second_rows[:, None] + second_k[None, :], second_k, SECOND, 1, SECOND_EVEN)
        acc = tl.dot(more, second_weights, acc)
        _store(acc, added, out, row, column, rows, OUTPUTS, COLUMNS, RELU)


def join(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second: Tensor,
    second_weight: Tensor,
    second_stride: int,
    relu: bool,
    config: Sequence[int],
) -> Tensor:
    """Run the kernel; arguments as of the op in ``join.py``, already checked."""
    images, height, width, channels = x.shape
    outputs, more = weight.shape[0], second.shape[3]
    out = torch.empty((images, height, width, outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = JoinConfig(*config) if config else PLAIN
    rows, early = images * height * width, launches_early(x)
    down, across = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.columns)
    if tile.programs:
        down = max(1, min(down, tile.programs * _multiprocessors(x) // across))
        kernel, depths = convolution_join_keeping_kernel, {"DEPTH": padded(channels), "SECOND_DEPTH": padded(more)}
    else:
        kernel, depths = convolution_join_kernel, {"DEPTH": tile.depth}
    with on_device(x):
        kernel[(down * across,)](
            x, weight, bias, second, second_weight, out, rows, height, width, *second.shape[1:3],
            CHANNELS=channels, SECOND=more, OUTPUTS=outputs, STRIDE=second_stride, RELU=relu,
            ROWS=tile.rows, COLUMNS=tile.columns, EARLY=early, **depths,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(early),
        )  # fmt: skip
    return out


def _multiprocessors(x: Tensor) -> int:
    """Of the device; two in the interpreter, so that programs take several tiles."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
