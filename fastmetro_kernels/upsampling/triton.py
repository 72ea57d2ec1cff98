"""The Triton backend: CUDA devices, or CPU tensors in Triton's interpreter. Implements ``upsample_triton``.

A program makes a tile of output rows and channels: for matrices with the padded table also of batch elements, which
share the indices; for the others of entries, which are summed by a tree of fixed shape. Nothing is tuned at run time.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.upsampling import ops

_MAX_CHANNEL_TILE = 128


@triton.jit
def ell_kernel(
    x_ptr, columns_ptr, values_ptr, out_ptr,
    batch, rows, channels, batch_stride, token_stride, channel_stride,
    WIDTH: tl.constexpr, BATCH_TILE: tl.constexpr, ROW_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    """One tile [BATCH_TILE, ROW_TILE, CHANNEL_TILE] of the output, from the padded table."""
    row_tiles = tl.cdiv(rows, ROW_TILE)
    channel_tiles = tl.cdiv(channels, CHANNEL_TILE)
    program = tl.program_id(0)
    b = (program // (row_tiles * channel_tiles)).to(tl.int64) * BATCH_TILE + tl.arange(0, BATCH_TILE)
    m = (program // channel_tiles % row_tiles) * ROW_TILE + tl.arange(0, ROW_TILE)
    c = (program % channel_tiles) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    row_mask = m < rows
    outer_mask = (b < batch)[:, None, None] & (c < channels)[None, None, :]
    source = x_ptr + b[:, None, None] * batch_stride + (c.to(tl.int64) * channel_stride)[None, None, :]
    sums = tl.zeros([BATCH_TILE, ROW_TILE, CHANNEL_TILE], dtype=tl.float32)
    for slot in tl.static_range(WIDTH):
        entry = m.to(tl.int64) * WIDTH + slot
        column = tl.load(columns_ptr + entry, mask=row_mask, other=-1)
        value = tl.load(values_ptr + entry, mask=row_mask, other=0.0)
        mask = outer_mask & (column >= 0)[None, :, None]
        x = tl.load(source + (column.to(tl.int64) * token_stride)[None, :, None], mask=mask, other=0.0)
        sums += value[None, :, None] * x.to(tl.float32)
    target = (b[:, None, None] * rows + m.to(tl.int64)[None, :, None]) * channels + c[None, None, :]
    tl.store(out_ptr + target, sums.to(out_ptr.dtype.element_ty), mask=outer_mask & row_mask[None, :, None])


@triton.jit
def csr_kernel(
    x_ptr, row_offsets_ptr, columns_ptr, values_ptr, out_ptr,
    rows, channels, batch_stride, token_stride, channel_stride,
    ROW_TILE: tl.constexpr, ENTRY_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    """One tile [ROW_TILE, CHANNEL_TILE] of the output of one batch element, ENTRY_TILE entries of a row at a time."""
    row_tiles = tl.cdiv(rows, ROW_TILE)
    channel_tiles = tl.cdiv(channels, CHANNEL_TILE)
    program = tl.program_id(0)
    b = (program // (row_tiles * channel_tiles)).to(tl.int64)
    m = (program // channel_tiles % row_tiles) * ROW_TILE + tl.arange(0, ROW_TILE)
    c = (program % channel_tiles) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    slot = tl.arange(0, ENTRY_TILE)
    row_mask = m < rows
    channel_mask = c < channels
    first = tl.load(row_offsets_ptr + m, mask=row_mask, other=0).to(tl.int64)
    last = tl.load(row_offsets_ptr + m + 1, mask=row_mask, other=0).to(tl.int64)
    source = x_ptr + b * batch_stride + (c.to(tl.int64) * channel_stride)[None, None, :]
    sums = tl.zeros([ROW_TILE, CHANNEL_TILE], dtype=tl.float32)
    for start in range(0, tl.max(last - first), ENTRY_TILE):
        entry = first[:, None] + start + slot[None, :]
        entry_mask = entry < last[:, None]
        column = tl.load(columns_ptr + entry, mask=entry_mask, other=0)
        value = tl.load(values_ptr + entry, mask=entry_mask, other=0.0)
        mask = entry_mask[:, :, None] & channel_mask[None, None, :]
        x = tl.load(source + (column.to(tl.int64) * token_stride)[:, :, None], mask=mask, other=0.0)
        sums += tl.sum(value[:, :, None] * x.to(tl.float32), axis=1)
    target = (b * rows + m.to(tl.int64)[:, None]) * channels + c[None, :]
    tl.store(out_ptr + target, sums.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & channel_mask[None, :])


def ell_tiles(batch: int, channels: int) -> tuple[int, int, int]:
    """BATCH_TILE, ROW_TILE and CHANNEL_TILE of :func:`ell_kernel`."""
    channel_tile = min(triton.next_power_of_2(channels), _MAX_CHANNEL_TILE)
    return min(triton.next_power_of_2(batch), 8), max(1, 256 // channel_tile), channel_tile


def csr_tiles(rows: int, entries: int, channels: int) -> tuple[int, int, int]:
    """ROW_TILE, ENTRY_TILE and CHANNEL_TILE of :func:`csr_kernel`."""
    channel_tile = min(triton.next_power_of_2(channels), _MAX_CHANNEL_TILE)
    entry_tile = min(triton.next_power_of_2(max(1, entries // rows)), 16)
    return max(1, 1024 // (channel_tile * entry_tile)), entry_tile, channel_tile


def upsample(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    ell_columns: Tensor | None,
    ell_values: Tensor | None,
    rows: int,
) -> Tensor:
    """Run the kernel that fits the layout; shapes as in ``ops.py``, not float64."""
    ops.check_arguments(x, row_offsets, columns, values, ell_columns, ell_values, rows)
    torch._check(x.dtype != torch.float64, lambda: "upsample_triton does not take float64")
    batch, _, channels = x.shape
    out = x.new_empty((batch, rows, channels))
    if out.numel() == 0:
        return out
    sizes = (rows, channels, *x.stride())
    with torch.cuda.device_of(x):
        if ell_columns is not None:
            batch_tile, row_tile, channel_tile = ell_tiles(batch, channels)
            tiles = triton.cdiv(batch, batch_tile) * triton.cdiv(rows, row_tile) * triton.cdiv(channels, channel_tile)
            ell_kernel[(tiles,)](
                x, ell_columns, ell_values, out, batch, *sizes,
                ell_columns.size(1), batch_tile, row_tile, channel_tile,
            )  # fmt: skip
        else:
            row_tile, entry_tile, channel_tile = csr_tiles(rows, columns.numel(), channels)
            tiles = batch * triton.cdiv(rows, row_tile) * triton.cdiv(channels, channel_tile)
            csr_kernel[(tiles,)](
                x, row_offsets, columns, values, out, *sizes, row_tile, entry_tile, channel_tile
            )  # fmt: skip
    return out

