"""The Triton backend of the crops: CUDA devices, or CPU tensors in Triton's interpreter.

A program makes BLOCK pixels of one crop, all three channels of them. Neighbouring pixels read neighbouring bytes, which
the caches serve: what comes from memory is each picture once, and what goes there is each crop once.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.crops.ops import FINE, CropMap
from fastmetro_kernels.fused.early_launch import on_device

BLOCK = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of the launch. No products fused with sums: positions would round to other 32nds of a pixel than the reference's."""


@triton.jit
def _rounded(x):
    """To the nearest whole number, halves to the even one: below 2^51 a float64 of this size has no others."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _placed(a, b, c, x, y, origin, FIXED: tl.constexpr, FINE: tl.constexpr):
    """Number of the first of two pixels, and the share of the second one."""
    if FIXED:
        steps = _rounded(a * x * 1024) + _rounded((b * y + c) * 1024) + 16
        steps = tl.floor(steps / 32)
        whole = tl.floor(steps / FINE)
        share = (steps - FINE * whole) / FINE
    else:
        place = a * x + b * y + c
        whole = tl.floor(place)
        share = place - whole
    return (whole - origin).to(tl.int64), share.to(tl.float32)


@triton.jit
def _finished(total, factor, mean, deviation):
    """A channel as the network takes it."""
    unit = tl.minimum(tl.maximum(total * factor, 0.0), 255.0) / 255
    return (unit - mean) / deviation


@triton.jit
def render_crops_kernel(
    pixels, offsets, sizes, matrix, columns, rows, column_weights, row_weights, origin, factor, mean, deviation, out,
    count, size, blocks, FIXED: tl.constexpr, FINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one of the crops, `blocks` programs to a crop; `count`: of bytes that there are to read."""
    crop = (tl.program_id(0) // blocks).to(tl.int64)
    number = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    row, column = number // size, number % size
    valid = row < size
    offset, height, width = tl.load(offsets + crop), tl.load(sizes + crop * 2), tl.load(sizes + crop * 2 + 1)
    matrix += crop * 6
    m0, m1, m2 = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2)
    m3, m4, m5 = tl.load(matrix + 3), tl.load(matrix + 4), tl.load(matrix + 5)
    left, top = tl.load(origin + crop * 2), tl.load(origin + crop * 2 + 1)
    samples = crop * size * 2
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for sample in tl.static_range(4):
        c = samples + 2 * column + sample % 2
        r = samples + 2 * row + sample // 2
        x, y = tl.load(columns + c, mask=valid, other=0), tl.load(rows + r, mask=valid, other=0)
        weight = tl.load(row_weights + r, mask=valid, other=0) * tl.load(column_weights + c, mask=valid, other=0)
        first_x, right = _placed(m0, m1, m2, x, y, left, FIXED, FINE)
        first_y, lower = _placed(m3, m4, m5, x, y, top, FIXED, FINE)
        for corner in tl.static_range(4):
            px, py = first_x + corner % 2, first_y + corner // 2
            at = offset + 3 * (py * width + px)
            inside = valid & (px >= 0) & (px < width) & (py >= 0) & (py < height) & (at >= 0) & (at + 2 < count)
            share = (right if corner % 2 else 1 - right) * (lower if corner // 2 else 1 - lower) * weight
            red += tl.load(pixels + at, mask=inside, other=0).to(tl.float32) * share
            green += tl.load(pixels + at + 1, mask=inside, other=0).to(tl.float32) * share
            blue += tl.load(pixels + at + 2, mask=inside, other=0).to(tl.float32) * share
    factor += crop * 3
    area = size * size
    out += crop * 3 * area + number
    tl.store(out, _finished(red, tl.load(factor), tl.load(mean), tl.load(deviation)), mask=valid)
    green = _finished(green, tl.load(factor + 1), tl.load(mean + 1), tl.load(deviation + 1))
    tl.store(out + area, green, mask=valid)
    blue = _finished(blue, tl.load(factor + 2), tl.load(mean + 2), tl.load(deviation + 2))
    tl.store(out + 2 * area, blue, mask=valid)


def render(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, places: CropMap, constants: tuple[Tensor, ...], fixed: bool,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """Run the kernel; arguments as in ``ops.py``."""
    if out.numel() == 0:
        return out
    size = out.shape[2]
    blocks = triton.cdiv(size * size, BLOCK)
    given = [one.contiguous() for one in (pixels, offsets, sizes, *places, *constants)]
    with on_device(pixels):
        render_crops_kernel[(out.shape[0] * blocks,)](
            *given, out, pixels.numel(), size, blocks,
            FIXED=fixed, FINE=FINE, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return out
