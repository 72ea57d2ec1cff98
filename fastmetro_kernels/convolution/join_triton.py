"""The Triton kernel for two added 1 x 1 convolutions: CUDA devices, or CPU tensors in Triton's interpreter.

A product of matrices whose depth has two parts. One loop takes the steps of both, so that the second's first tiles are
on their way while the first's last are multiplied: with 64 channels each there are only two steps in all. Where a row's
pixel of the second input lies is computed once, in front of the loop. Columns of tiles run fastest, so that programs at
a time share pixels in L2; nothing is tuned at run time, and no two programs write to one place.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.convolution.join_configs import TILES, JoinConfig, fitted
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device


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


@triton.jit(do_not_specialize=["rows", "height", "width", "second_height", "second_width"])
def convolution_join_kernel(
    x, weight, bias, second, second_weight, out, rows, height, width, second_height, second_width,
    CHANNELS: tl.constexpr, SECOND: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
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

    acc += tl.load(bias + near_column)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mask = (row < rows)[:, None]
    if OUTPUTS % COLUMNS != 0:
        mask = mask & (column < OUTPUTS)[None, :]
    target = out + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


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
    tile = JoinConfig(*config) if config else fitted(TILES[0], channels, more)
    rows, early = images * height * width, launches_early(x)
    with on_device(x):
        convolution_join_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns),)](
            x, weight, bias, second, second_weight, out, rows, height, width, *second.shape[1:3],
            CHANNELS=channels, SECOND=more, OUTPUTS=outputs, STRIDE=second_stride, RELU=relu,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, EARLY=early,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(early),
        )  # fmt: skip
    return out
