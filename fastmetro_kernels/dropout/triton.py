"""The Triton backend of the dropout behind a ReLU: CUDA devices, or CPU tensors in Triton's interpreter.

One launch to a pass, over the elements in a line. A lane asks for four times 16 bytes in half precision before it
waits; the random numbers, a call for each of these 16 bytes, are computed while they come. With a bias a program has
some columns of some rows instead, whose random numbers are those of the line. Backward it goes through a group of rows,
keeps the sums of its columns in registers, and a second launch (``column_sums.py``) joins those of all groups.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels import column_sums
from fastmetro_kernels.dropout import ops
from fastmetro_kernels.dropout.random import scale_of_kept, threshold
from fastmetro_kernels.dropout.triton_random import kept_factors_of_line, kept_factors_of_part
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

BLOCK = 4096
"""Elements of a program."""
WARPS = 4
WIDEST = 256
"""Columns of a program at most: 16 bytes in half precision for each lane of a warp, which has a row."""
BIASED_WARPS = 8
"""Of a program that adds a bias: with four, lanes need twice the registers, and fewer bytes are under way."""
SUMMED = 2048
"""Elements at a time of a program that sums columns: a lane has as many bytes under way, of two tensors."""
PROGRAMS = 1056
"""That sum columns, at most: eight on each multiprocessor of a large GPU. The same number everywhere, so that sums are
taken in the same order on every device."""


@triton.jit(do_not_specialize=["threshold"])  # whether 16 divides the count decides how wide reads are
def relu_dropout_kernel(
    x, seed, out, count, threshold, scale, BLOCK: tl.constexpr, DROPS: tl.constexpr, EARLY: tl.constexpr
):
    """dropout(relu(x)) of `count` elements. What is no number stays so: it is multiplied by 0, not left out."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    inside = place < count
    await_earlier_kernels(EARLY)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(value < 0.0, 0.0, value)
    if DROPS:
        group = start // 8 + tl.arange(0, BLOCK // 8)
        value *= kept_factors_of_line(seed, group, threshold, scale, BLOCK)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def relu_dropout_backward_kernel(grad, out, grad_x, count, scale, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The gradient where the result is positive, times the scale of what was kept."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    await_earlier_kernels(EARLY)
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    through = tl.where(result > 0.0, given * scale, 0.0)
    tl.store(grad_x + place, through.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold"])
def biased_relu_dropout_kernel(
    x, bias, seed, out, rows, width, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """dropout(relu(x + bias)) of some rows and columns; the width is a multiple of 8."""
    blocks = tl.cdiv(width, COLUMNS)
    start = tl.program_id(0) % blocks * COLUMNS
    c = start + tl.arange(0, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (c < width)[None, :]
    offset = row.to(tl.int64)[:, None] * width + c[None, :]
    await_earlier_kernels(EARLY)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=c < width, other=0.0)[None, :]
    value = tl.where(value < 0.0, 0.0, value)
    if DROPS:
        group = row.to(tl.int64)[:, None] * (width // 8) + (start // 8 + tl.arange(0, COLUMNS // 8))[None, :]
        value *= kept_factors_of_part(seed, group, threshold, scale, ROWS, COLUMNS)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def biased_relu_dropout_backward_kernel(
    grad, out, grad_x, partials, rows, width, each, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient of some columns of a group of `each` rows, and its sums."""
    blocks = tl.cdiv(width, COLUMNS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    known = c < width
    group = tl.program_id(0) // blocks
    begin = group * each
    end = tl.minimum(begin + each, rows)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    await_earlier_kernels(EARLY)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        offset = row.to(tl.int64)[:, None] * width + c[None, :]
        given = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        result = tl.load(out + offset, mask=inside, other=0.0).to(tl.float32)
        through = tl.where(result > 0.0, given * scale, 0.0)
        tl.store(grad_x + offset, through.to(grad_x.dtype.element_ty), mask=inside)
        sums += through
    tl.store(partials + group.to(tl.int64) * width + c, tl.sum(sums, 0), mask=known)


def columns_of(width: int) -> int:
    """Of a program: a power of two, at least those that share random numbers."""
    return min(WIDEST, max(8, triton.next_power_of_2(width)))


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    early = launches_early(x)
    options = {"BLOCK": BLOCK, "EARLY": early, "num_warps": WARPS} | launch_options(early)
    return (triton.cdiv(x.numel(), BLOCK),), options


def forward(x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_forward(x, bias, seed)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    numbers = (threshold(p), scale_of_kept(p))
    with on_device(x):
        if bias is None:
            grid, options = _launch(x)
            relu_dropout_kernel[grid](x, seed, out, x.numel(), *numbers, DROPS=seed is not None, **options)
            return out
        width, early = x.shape[-1], launches_early(x)
        rows, columns = x.numel() // width, columns_of(width)
        tile = BLOCK // columns
        biased_relu_dropout_kernel[(triton.cdiv(width, columns) * triton.cdiv(rows, tile),)](
            x, bias, seed, out, rows, width, *numbers,
            ROWS=tile, COLUMNS=columns, DROPS=seed is not None, EARLY=early, num_warps=BIASED_WARPS,
            **launch_options(early),
        )  # fmt: skip
    return out


def backward(grad: Tensor, out: Tensor, p: float, biased: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel, or both; arguments as in ``ops.py``."""
    ops.check_backward(grad, out, biased)
    grad_x, grad_bias = ops.empty_gradients(grad, biased)
    if grad.numel() == 0:
        return grad_x, grad_bias.zero_()
    with on_device(grad):
        if not biased:
            grid, options = _launch(grad)
            relu_dropout_backward_kernel[grid](grad, out, grad_x, grad.numel(), scale_of_kept(p), **options)
            return grad_x, grad_bias
        width = grad.shape[-1]
        rows, columns = grad.numel() // width, columns_of(width)
        blocks, tile = triton.cdiv(width, columns), SUMMED // columns
        tiles = triton.cdiv(rows, tile)
        each = tile * triton.cdiv(tiles, max(1, min(PROGRAMS // blocks, tiles)))
        groups = triton.cdiv(rows, each)
        partials = grad_bias.new_empty((1, groups, width))
        early = launches_early(grad)
        options = {"EARLY": early} | launch_options(early)
        biased_relu_dropout_backward_kernel[(blocks * groups,)](
            grad, out, grad_x, partials, rows, width, each, scale_of_kept(p),
            ROWS=tile, COLUMNS=columns, num_warps=WARPS, **options,
        )  # fmt: skip
        column_sums.join(partials, [grad_bias], options)
    return grad_x, grad_bias
