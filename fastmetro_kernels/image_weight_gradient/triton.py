"""The Triton backend: CUDA devices, or CPU tensors in Triton's interpreter. Two launches.

A row of a window of an image in channels_last lies in memory as one run of `kernel * C` numbers. So a program reads
for its positions the gradient once, [positions, O], and one such run per row of the window, [positions, 32], and adds
up one product, [O, 32], per row. The second kernel adds up the programs' sums.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device
from fastmetro_kernels.image_weight_gradient import ops
from fastmetro_kernels.image_weight_gradient.plan import PATCH, PINNED, ImageWeightGradientConfig, shares

SIZES = ["positions", "each", "height", "width", "out_height", "out_width", "programs"]
"""Arguments whose values make no kernels of their own."""
COLUMNS = 64
"""Sums that a program of the second kernel adds up."""
PARTS = 32
"""Programs' sums that it reads at a time."""
_INT32_NUMBERS = 2**31 - 2**23
"""So many numbers of a tensor, and places of programs beyond them, can be counted in 32 bits."""


@triton.jit
def _windows(
    start, end, height, width, out_height, out_width,
    POSITIONS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a tile of positions: image, first row and column of the window in it, and which positions are there."""
    position = start + tl.arange(0, POSITIONS)
    if WIDE:
        position = position.to(tl.int64)
    line = position // out_width
    image = line // out_height
    row = (line - image * out_height) * STRIDE - PADDING
    column = (position - line * out_width) * STRIDE - PADDING
    return image, row, column, position, position < end


@triton.jit
def _row_of_windows(
    x, image, row, column, inside, height, width,
    ROW: tl.constexpr, KERNEL: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """One row of each window, [positions, PATCH], 0 outside of the image and behind the window."""
    run = tl.arange(0, PATCH)
    at = row + ROW
    across = column[:, None] + (run // CHANNELS)[None, :]
    there = (inside & (at >= 0) & (at < height))[:, None] & (across >= 0) & (across < width)
    there &= (run < KERNEL * CHANNELS)[None, :]
    offset = ((image * height + at) * width + column) * CHANNELS
    return tl.load(x + offset[:, None] + run[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def image_weight_gradient_kernel(
    x, grad, partials, positions, each, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    POSITIONS: tl.constexpr, PATCH: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sums of a program over its positions, [KERNEL, OUTPUTS, PATCH]."""
    await_earlier_kernels(EARLY)
    program = tl.program_id(0)
    begin = program.to(tl.int64) * each if WIDE else program * each
    end = tl.minimum(begin + each, positions)
    o = tl.arange(0, OUTPUTS)
    zero = tl.zeros([OUTPUTS, PATCH], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero)
    for start in range(begin, end, POSITIONS):
        image, row, column, position, inside = _windows(
            start, end, height, width, out_height, out_width, POSITIONS, STRIDE, PADDING, WIDE
        )
        given = tl.load(grad + position[:, None] * OUTPUTS + o[None, :], mask=inside[:, None], other=0.0)
        given = tl.trans(given)
        found = ()
        for i in tl.static_range(7):
            if i < KERNEL:
                window = _row_of_windows(
                    x, image, row, column, inside, height, width, i, KERNEL, CHANNELS, PATCH
                )  # fmt: skip
                found = found + (tl.dot(given, window, sums[i], input_precision="ieee"),)  # noqa: RUF005 - Triton has no other way
            else:
                found = found + (sums[i],)  # noqa: RUF005
        sums = found
    run = tl.arange(0, PATCH)
    for i in tl.static_range(7):
        if i < KERNEL:
            to = ((program * KERNEL + i) * OUTPUTS + o)[:, None] * PATCH + run[None, :]
            tl.store(partials + to, sums[i])


@triton.jit(do_not_specialize=SIZES)
def image_weight_gradient_join_kernel(
    partials, weight, programs,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL: tl.constexpr, PATCH: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sums over all programs, in the weight's order of memory: [OUTPUTS, KERNEL, KERNEL * CHANNELS]."""
    await_earlier_kernels(EARLY)
    entry = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # of [KERNEL, OUTPUTS, PATCH]
    part = tl.arange(0, PARTS)
    found = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, programs, PARTS):
        at = (start + part)[:, None] * (KERNEL * OUTPUTS * PATCH) + entry[None, :]
        found += tl.load(partials + at, mask=(start + part < programs)[:, None], other=0.0)
    run = entry % PATCH
    o = entry // PATCH % OUTPUTS
    row = entry // (PATCH * OUTPUTS)
    to = (o * KERNEL + row) * (KERNEL * CHANNELS) + run
    tl.store(weight + to, tl.sum(found, 0).to(weight.dtype.element_ty), mask=run < KERNEL * CHANNELS)


def weight_gradient(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int, config: Sequence[int]) -> Tensor:
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check(x, grad, kernel, stride, padding, config)
    tile = ImageWeightGradientConfig(*config) if config else PINNED
    _, outputs, out_height, out_width = grad.shape
    positions = grad.numel() // outputs
    programs, each = shares(positions, tile)
    entries = kernel * outputs * PATCH
    partials = torch.empty(programs * entries, dtype=torch.float32, device=x.device)
    weight = ops.empty_weight(x, grad, kernel)
    early = launches_early(x)
    fixed: dict[str, Any] = {"CHANNELS": x.shape[1], "OUTPUTS": outputs, "KERNEL": kernel, "PATCH": PATCH}
    options = launch_options(early) | {"EARLY": early}
    wide = max(x.numel(), grad.numel()) > _INT32_NUMBERS
    with on_device(x):
        if programs:
            image_weight_gradient_kernel[(programs,)](
                x, grad, partials, positions, each, *x.shape[2:], out_height, out_width, STRIDE=stride, PADDING=padding,
                POSITIONS=tile.positions, WIDE=wide, num_warps=tile.warps, **fixed, **options,
            )  # fmt: skip
        image_weight_gradient_join_kernel[(entries // COLUMNS,)](
            partials, weight, programs, COLUMNS=COLUMNS, PARTS=PARTS, num_warps=4, **fixed, **options
        )
    return weight
