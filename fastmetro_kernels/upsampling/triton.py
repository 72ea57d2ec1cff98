"""The Triton backend: CUDA devices, or CPU tensors in Triton's interpreter. Implements ``upsample_triton``.

A program makes a tile of output positions (a row and a channel each, in the order of memory, so that 3 channels are
written without gaps) of several batch elements, which share the indices. Matrices without the padded table are walked
through a tile of entries at a time, which a tree of fixed shape sums up. Nothing is tuned at run time.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.upsampling import ops

_INT32_POSITIONS = 2**31 - 2**13
"""So many positions, and those of a tile after them, can be counted in 32 bits."""


@triton.jit
def ell_kernel(
    x_ptr, columns_ptr, values_ptr, out_ptr,
    batch, positions, channels, batch_stride, token_stride, channel_stride,
    WIDTH: tl.constexpr, BATCH_TILE: tl.constexpr, POSITION_TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile [BATCH_TILE, POSITION_TILE] of the output, from the padded table."""
    tiles = tl.cdiv(positions, POSITION_TILE)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64) * BATCH_TILE + tl.arange(0, BATCH_TILE)
    tile = program % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    position = tile * POSITION_TILE + tl.arange(0, POSITION_TILE)
    position_mask = position < positions
    row = (position // channels).to(tl.int64)
    channel = (position % channels).to(tl.int64)
    mask = (b < batch)[:, None] & position_mask[None, :]
    source = x_ptr + b[:, None] * batch_stride + (channel * channel_stride)[None, :]
    sums = tl.zeros([BATCH_TILE, POSITION_TILE], dtype=tl.float32)
    for slot in tl.static_range(WIDTH):
        column = tl.load(columns_ptr + row * WIDTH + slot, mask=position_mask, other=-1)
        value = tl.load(values_ptr + row * WIDTH + slot, mask=position_mask, other=0.0)
        x_mask = mask & (column >= 0)[None, :]
        x = tl.load(source + (column.to(tl.int64) * token_stride)[None, :], mask=x_mask, other=0.0)
        sums += value[None, :] * x.to(tl.float32)
    target = b[:, None] * positions + position[None, :]
    tl.store(out_ptr + target, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def csr_kernel(
    x_ptr, row_offsets_ptr, columns_ptr, values_ptr, out_ptr,
    batch, positions, channels, batch_stride, token_stride, channel_stride,
    BATCH_TILE: tl.constexpr, POSITION_TILE: tl.constexpr, ENTRY_TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile [BATCH_TILE, POSITION_TILE] of the output, ENTRY_TILE entries of a row at a time."""
    tiles = tl.cdiv(positions, POSITION_TILE)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64) * BATCH_TILE + tl.arange(0, BATCH_TILE)
    tile = program % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    position = tile * POSITION_TILE + tl.arange(0, POSITION_TILE)
    slot = tl.arange(0, ENTRY_TILE)
    position_mask = position < positions
    row = position // channels
    channel = (position % channels).to(tl.int64)
    mask = (b < batch)[:, None] & position_mask[None, :]
    first = tl.load(row_offsets_ptr + row, mask=position_mask, other=0).to(tl.int64)
    last = tl.load(row_offsets_ptr + row + 1, mask=position_mask, other=0).to(tl.int64)
    source = x_ptr + (b[:, None] * batch_stride + (channel * channel_stride)[None, :])[:, :, None]
    sums = tl.zeros([BATCH_TILE, POSITION_TILE], dtype=tl.float32)
    for start in range(0, tl.max(last - first), ENTRY_TILE):
        entry = first[:, None] + start + slot[None, :]
        entry_mask = entry < last[:, None]
        column = tl.load(columns_ptr + entry, mask=entry_mask, other=0)
        value = tl.load(values_ptr + entry, mask=entry_mask, other=0.0)
        x_mask = mask[:, :, None] & entry_mask[None, :, :]
        x = tl.load(source + (column.to(tl.int64) * token_stride)[None, :, :], mask=x_mask, other=0.0)
        sums += tl.sum(value[None, :, :] * x.to(tl.float32), axis=2)
    target = b[:, None] * positions + position[None, :]
    tl.store(out_ptr + target, sums.to(out_ptr.dtype.element_ty), mask=mask)


def ell_tiles(batch: int) -> tuple[int, int]:
    """BATCH_TILE and POSITION_TILE of :func:`ell_kernel`."""
    return min(triton.next_power_of_2(batch), 8), 128


def csr_tiles(batch: int, rows: int, entries: int) -> tuple[int, int, int]:
    """BATCH_TILE, POSITION_TILE and ENTRY_TILE of :func:`csr_kernel`. The entries depend on the matrix alone."""
    batch_tile = min(triton.next_power_of_2(batch), 4)
    entry_tile = min(triton.next_power_of_2(max(1, entries // rows)), 16)
    return batch_tile, 1024 // (batch_tile * entry_tile), entry_tile


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
    positions = rows * channels
    sizes = (batch, positions, channels, *x.stride())
    wide = positions > _INT32_POSITIONS
    with torch.cuda.device_of(x):
        if ell_columns is not None:
            batch_tile, position_tile = ell_tiles(batch)
            programs = triton.cdiv(batch, batch_tile) * triton.cdiv(positions, position_tile)
            ell_kernel[(programs,)](
                x, ell_columns, ell_values, out, *sizes, ell_columns.size(1), batch_tile, position_tile, wide
            )  # fmt: skip
        else:
            batch_tile, position_tile, entry_tile = csr_tiles(batch, rows, columns.numel())
            programs = triton.cdiv(batch, batch_tile) * triton.cdiv(positions, position_tile)
            csr_kernel[(programs,)](
                x, row_offsets, columns, values, out, *sizes, batch_tile, position_tile, entry_tile, wide
            )  # fmt: skip
    return out
