"""The Triton backend of the max pool: CUDA devices, or CPU tensors in Triton's interpreter.

Window (r, q) stands around position (2r, 2q), so there are as many windows as blocks of two by two positions that begin
there. One launch to a pass. A lane has 16 bytes of channels of one column of windows, and goes down a few of them: the
rows and windows that neighbours share it reads once. Forward: it finds the maximum of each row of three and where it
is, then that of three rows. Backward: it makes the positions of a block from the four windows that hold some of them,
the block's own and those to the right, below, and below to the right.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device
from fastmetro_kernels.max_pool import ops
from fastmetro_kernels.max_pool.plan import PINNED, MaxPoolConfig, plan

SIZES = ["strips", "height", "width", "out_height", "out_width"]
"""Arguments whose values make no kernels of their own."""
_INT32_NUMBERS = 2**31 - 2**23
"""So many numbers of a tensor, and places of programs beyond them, can be counted in 32 bits."""
_MOST_PROGRAMS = 65535
"""Of all axes of a launch but the first."""


@triton.jit
def _own_strips(
    strips, out_height, out_width, channels,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of this program: image, first row of windows, column of windows, and which of them are there; its channels."""
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    if WIDE:
        tile = tile.to(tl.int64)
    strip = tile * POSITIONS + tl.arange(0, POSITIONS)
    group = _quotient(strip, out_width, WIDE)  # of ROWS rows, counted through all images
    groups = (out_height + (ROWS - 1)) // ROWS
    image = _quotient(group, groups, WIDE)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return image, (group - image * groups) * ROWS, strip - group * out_width, strip < strips, c


@triton.jit
def _quotient(a, b, WIDE: tl.constexpr):
    """Of numbers that are not negative: without their signs it takes fewer instructions."""
    if WIDE:  # noqa: SIM108 - known when it is compiled, and only one of them is
        found = a // b
    else:
        found = (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)
    return found


@triton.jit
def _offset(image, row, column, c, height, width, channels):
    """Of positions of an image in channels_last."""
    return (((image * height + row) * width + column) * channels)[:, None] + c[None, :]


@triton.jit
def _later(best, place, value, other_place):
    """The greater of two maxima, the first where they are equal, NaN if one is; and its place, where none is NaN."""
    place = tl.where(value > best, other_place, place)
    return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL), place


@triton.jit
def _neighbours(middle, row, column, height, width, channels, known, inside):
    """Three positions of a row, -inf where there is none; `middle`: address of the second one."""
    here = known & (row >= 0) & (row < height)
    nothing = float("-inf")
    left = tl.load(middle - channels, mask=(here & (column > 0))[:, None] & inside, other=nothing).to(tl.float32)
    centre = tl.load(middle, mask=here[:, None] & inside, other=nothing).to(tl.float32)
    is_right = here & (column + 1 < width)
    right = tl.load(middle + channels, mask=is_right[:, None] & inside, other=nothing).to(tl.float32)
    return left, centre, right


@triton.jit
def _row_maximum(middle, row, column, height, width, channels, known, inside, FIRST: tl.constexpr):
    """The maximum of three positions of a row, and FIRST, FIRST + 1 or FIRST + 2."""
    left, centre, right = _neighbours(middle, row, column, height, width, channels, known, inside)
    best, place = _later(left, FIRST, centre, FIRST + 1)
    return _later(best, place, right, FIRST + 2)


@triton.jit
def _correct_places(
    middle, to, row, column, height, width, out_height, channels, down, down_windows, known, inside, ROWS: tl.constexpr
):
    """Of maxima that are NaN: the last one in the window. A loop that is not unrolled, for it seldom runs."""
    for i in range(ROWS):
        y = 2 * (row + i)
        place = tl.full(to.shape, -1, tl.int32)
        for k in range(3):
            left, centre, right = _neighbours(
                middle + (k - 1) * down, y + k - 1, column, height, width, channels, known, inside
            )  # fmt: skip
            place = tl.where(left != left, 3 * k, place)
            place = tl.where(centre != centre, 3 * k + 1, place)
            place = tl.where(right != right, 3 * k + 2, place)
        stored = (known & (row + i < out_height))[:, None] & inside & (place >= 0)
        tl.store(to, place.to(tl.uint8), mask=stored)
        middle += 2 * down
        to += down_windows


@triton.jit(do_not_specialize=SIZES)
def max_pool_kernel(
    x, out, places, strips, height, width, out_height, out_width, channels,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Maxima and their places."""
    await_earlier_kernels(EARLY)
    image, row, column, known, c = _own_strips(
        strips, out_height, out_width, channels, ROWS, POSITIONS, CHANNELS, WIDE
    )  # fmt: skip
    inside = (c < channels)[None, :]
    if WIDE:
        width, out_width = width.to(tl.int64), out_width.to(tl.int64)
    middle = x + _offset(image, 2 * row, 2 * column, c, height, width, channels)  # of the first window
    down = width * channels
    to = _offset(image, row, column, c, out_height, out_width, channels)
    down_windows = out_width * channels
    at_edge = tl.where(column == 0, 1, 0)
    best, place = _row_maximum(
        middle - down, 2 * row - 1, 2 * column, height, width, channels, known, inside, 0
    )  # fmt: skip
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for i in tl.static_range(ROWS):
        y = 2 * (row + i)
        value, other = _row_maximum(middle, y, 2 * column, height, width, channels, known, inside, 3)
        best, place = _later(best, place, value, other)
        value, other = _row_maximum(middle + down, y + 1, 2 * column, height, width, channels, known, inside, 6)
        best, place = _later(best, place, value, other)
        # At an edge the first position is not there; it has stayed the place only where all are -inf.
        place = tl.maximum(place, (at_edge + tl.where(row + i == 0, 3, 0))[:, None])
        stored = (known & (row + i < out_height))[:, None] & inside
        tl.store(out + to, best.to(out.dtype.element_ty), mask=stored)
        tl.store(places + to, place.to(tl.uint8), mask=stored)
        total += best
        best, place = value, other - 6  # the first row of the next windows
        middle += 2 * down
        to += down_windows
    total = tl.sum(tl.sum(total, 1), 0)
    if total != total:  # seldom: some maximum is NaN (or infinite), whose place is not the one that was found
        _correct_places(
            middle - 2 * ROWS * down, places + to - ROWS * down_windows, row, 2 * column, height, width, out_height,
            channels, down, down_windows, known, inside, ROWS,
        )  # fmt: skip


@triton.jit
def _window(grad, more, places, at, there, TWO: tl.constexpr):
    """A window's gradient, the sum of TWO if so, 0 where there is none; and the place of its maximum."""
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    if TWO:
        g += tl.load(more + at, mask=there, other=0.0).to(tl.float32)
    return g, tl.load(places + at, mask=there, other=0).to(tl.int32)


@triton.jit
def _only(grad, place, PLACE: tl.constexpr):
    """A window's gradient where its maximum has this place, else 0."""
    return tl.where(place == PLACE, grad, 0.0)


@triton.jit
def _plus(total, grad, place, PLACE: tl.constexpr):
    """And that of a further window: an addition that takes place or not, rather than that of a number or 0."""
    return tl.where(place == PLACE, total + grad, total)


@triton.jit(do_not_specialize=SIZES)
def max_pool_backward_kernel(
    grad, more, places, grad_x, strips, height, width, out_height, out_width, channels,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient of x, a block of two by two positions at a time."""
    await_earlier_kernels(EARLY)
    image, row, column, known, c = _own_strips(
        strips, out_height, out_width, channels, ROWS, POSITIONS, CHANNELS, WIDE
    )  # fmt: skip
    inside = (c < channels)[None, :]
    if WIDE:
        width, out_width = width.to(tl.int64), out_width.to(tl.int64)
    at = _offset(image, row, column, c, out_height, out_width, channels)
    down_windows = out_width * channels
    to = grad_x + _offset(image, 2 * row, 2 * column, c, height, width, channels)
    down = width * channels
    is_right = column + 1 < out_width
    is_second = (2 * column + 1 < width)[:, None]
    there = known & (row < out_height)
    g, place = _window(grad, more, places, at, there[:, None] & inside, TWO)
    g_right, place_right = _window(grad, more, places, at + channels, (there & is_right)[:, None] & inside, TWO)
    for i in tl.static_range(ROWS):
        at += down_windows
        below = known & (row + i + 1 < out_height)
        g_below, place_below = _window(grad, more, places, at, below[:, None] & inside, TWO)
        g_last, place_last = _window(grad, more, places, at + channels, (below & is_right)[:, None] & inside, TWO)
        y = 2 * (row + i)
        element = grad_x.dtype.element_ty
        stored = (known & (y < height))[:, None] & inside
        tl.store(to, _only(g, place, 4).to(element), mask=stored)
        total = _plus(_only(g, place, 5), g_right, place_right, 3)
        tl.store(to + channels, total.to(element), mask=stored & is_second)
        stored = (known & (y + 1 < height))[:, None] & inside
        total = _plus(_only(g, place, 7), g_below, place_below, 1)
        tl.store(to + down, total.to(element), mask=stored)
        total = _plus(_only(g, place, 8), g_right, place_right, 6)
        total = _plus(_plus(total, g_below, place_below, 2), g_last, place_last, 0)
        tl.store(to + down + channels, total.to(element), mask=stored & is_second)
        g, place, g_right, place_right = g_below, place_below, g_last, place_last
        to += 2 * down


def _shared_out(
    windows: Tensor, height: int, width: int, config: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """The grid, the sizes that kernels take, and the options of their launches, for windows [B, C, H', W']."""
    batch, channels, rows, columns = windows.shape
    tile = MaxPoolConfig(*config) if config else PINNED
    found = plan(batch, rows, columns, channels, windows.dtype.itemsize, tile)
    grid = found.blocks, min(found.tiles, _MOST_PROGRAMS), -(-found.tiles // _MOST_PROGRAMS)
    early = launches_early(windows)
    options: dict[str, Any] = {"ROWS": tile.rows, "POSITIONS": found.positions, "CHANNELS": found.channels}
    options["WIDE"] = batch * channels * height * width > _INT32_NUMBERS
    options |= {"EARLY": early, "num_warps": tile.warps}
    sizes = (found.strips, height, width, rows, columns, channels)
    return grid, sizes, options | launch_options(early)


def forward(x: Tensor, config: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_image("x", x)
    out, places = ops.empty_results(x)
    if out.numel() == 0:
        return out, places
    grid, sizes, options = _shared_out(out, x.shape[2], x.shape[3], config)
    with on_device(x):
        max_pool_kernel[grid](x, out, places, *sizes, **options)
    return out, places


def backward(
    grad: Tensor, more: Tensor | None, places: Tensor, height: int, width: int, config: Sequence[int]
) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_backward(grad, more, places, height, width)
    grad_x = ops.empty_image(grad, height, width)
    if grad_x.numel() == 0:
        return grad_x
    grid, sizes, options = _shared_out(grad, height, width, config)
    with on_device(grad):
        max_pool_backward_kernel[grid](grad, more, places, grad_x, *sizes, TWO=more is not None, **options)
    return grad_x
