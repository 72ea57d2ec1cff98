"""Cuts of a sparse matrix for the CUDA kernel that streams a batch of points past it (``csrc/upsampling/stream.cuh``).

A cut splits the rows into blocks of equal size. A block's entries are dealt to the threads that hold them in registers,
and the block gets the list of the tokens (columns) that it touches: they are all that it reads of a batch element. Rows
of three entries stay in order, a row per lane. Other rows are shared by as many lanes as in the other kernels (``parts``
in ``csrc/upsampling/launch.h``), so that sums are taken in the same order; they are sorted by length, so that the
lanes of a warp have equally much to do, and dealt to the warps longest first.

Where a token lies in shared memory is free. The places are chosen such that lanes which read at the same time rarely
meet in a bank: each token takes the place, modulo 32, at which it meets the fewest others, the most used tokens first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

LANES = 32
POINT = 3
COPIES = {True: 6, False: 9}  # by whether all rows have three entries, as in csrc/upsampling/launch.h
SLOTS = {True: (3, 6, 9), False: (8, 12, 16)}
NOTHING, NO_ROW = 0xFFFFFFFF, 0xFFFF
ROWS_UNIT = 8  # a block begins at a multiple of so many rows, in the middle of no sector of memory
SMALLEST = 256  # rows of a matrix for which a stream is worth its tables


class Cut(NamedTuple):
    """Sizes of one cut. The order is that of ``Cut`` in ``csrc/upsampling/launch.h``."""

    offset: int
    """First word of its tables."""
    blocks: int
    block_rows: int
    threads: int
    slots: int
    tokens: int
    """Longest list of tokens of a block."""
    places: int
    """Of shared memory, without the one that holds zeros."""
    block_words: int
    """Size of the tables of a block."""


DEFAULT_CUTS = ((4, 27), (8, 27))
"""Blocks and warps of a block. 27 warps hold the rows of the body mesh (1,723 in a block of four, two for each thread)
without a rest, and copy all three channels of 288 tokens at a time."""


def parts_of(entries: int, rows: int) -> int:
    """Lanes that share a row, as in ``csrc/upsampling/launch.h``."""
    per_row = -(-entries // rows)
    return 1 if per_row <= 4 else 2 if per_row <= 8 else 4 if per_row <= 32 else 16


def build_streams(
    csr: sp.csr_array, cuts: Sequence[tuple[int, int]] | None = None
) -> tuple[np.ndarray, list[int]]:
    """All cuts that are possible, as one int32 array and the sizes of each, one after the other.

    Args:
        csr: The matrix, columns ascending in each row.
        cuts: Blocks and warps of a block, the latter a multiple of three; by default none for small matrices.
    """
    if cuts is None:
        cuts = DEFAULT_CUTS if csr.shape[0] >= SMALLEST else ()
    words: list[np.ndarray] = [np.zeros(0, np.int32)]
    sizes: list[int] = []
    for blocks, warps in cuts:
        made = _build_cut(csr, blocks, warps)
        if made is not None:
            tables, cut = made
            sizes += cut._replace(offset=sum(map(len, words)))
            words.append(tables)
    return np.concatenate(words), sizes


class _Block(NamedTuple):
    """One block: [slots, threads] column (-1: none), row of the block and value; slots and row ends of each warp."""

    columns: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    used: np.ndarray
    ends: np.ndarray


def _build_cut(csr: sp.csr_array, blocks: int, warps: int) -> tuple[np.ndarray, Cut] | None:
    rows, tokens = csr.shape
    if csr.nnz == 0 or tokens > NO_ROW:
        return None
    lengths = np.diff(csr.indptr)
    threes = bool((lengths == 3).all())
    block_rows = -(-rows // (blocks * ROWS_UNIT)) * ROWS_UNIT
    blocks = -(-rows // block_rows)
    if block_rows >= NO_ROW:
        return None
    deal = _deal_threes if threes else _deal_any
    dealt = [deal(csr, first, min(first + block_rows, rows), block_rows, warps) for first in range(0, rows, block_rows)]
    longest = max(len(block.columns) for block in dealt)
    slots = next((count for count in SLOTS[threes] if count >= longest), None)
    if slots is None:
        return None
    lists = [np.unique(block.columns[block.columns >= 0]) for block in dealt]
    most = max(map(len, lists))
    places = -(-most // LANES) * LANES
    if most * POINT > COPIES[threes] * warps * LANES or places > NO_ROW:
        return None
    tables = [_tables(*both, most, places) for both in zip(dealt, lists, strict=True)]
    block_words = max(map(len, tables))
    padded = [np.pad(table, (0, block_words - len(table))) for table in tables]
    return np.concatenate(padded), Cut(0, blocks, block_rows, warps * LANES, slots, most, places, block_words)


def _deal_threes(csr: sp.csr_array, first: int, last: int, block_rows: int, warps: int) -> _Block:
    """Three slots per row, the rows of a warp one after the other."""
    each = -(-block_rows // (warps * LANES))
    shape = (warps, each, LANES, 3)
    columns = np.full(warps * each * LANES * 3, -1, np.int64)
    values = np.zeros(len(columns), np.float32)
    entries = slice(csr.indptr[first], csr.indptr[last])
    count = entries.stop - entries.start
    columns[:count] = csr.indices[entries]
    values[:count] = csr.data[entries]

    def in_slots(array: np.ndarray) -> np.ndarray:
        return array.reshape(shape).transpose(1, 3, 0, 2).reshape(each * 3, warps * LANES)

    rows = np.zeros((each * 3, warps * LANES), np.int64)
    ends = sum(4 << 3 * i for i in range(each))
    return _Block(in_slots(columns), rows, in_slots(values), np.full(warps, each * 3), np.full(warps, ends))


def _deal_any(csr: sp.csr_array, first: int, last: int, block_rows: int, warps: int) -> _Block:
    """Groups of rows that fill a warp, sorted by length, each to the warp that has the least to do."""
    parts = parts_of(csr.nnz, csr.shape[0])
    lengths = np.diff(csr.indptr[first : last + 1])
    order = np.argsort(-lengths, kind="stable")
    groups = [order[start : start + LANES // parts] for start in range(0, len(order), LANES // parts)]
    load = np.zeros(warps, np.int64)
    dealt: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(warps)]
    for group in groups:
        warp = int(load.argmin())
        slots = max(1, -(-int(lengths[group[0]]) // parts))
        dealt[warp].append((group, slots))
        load[warp] += slots
    shape = (int(load.max()), warps, LANES // parts, parts)
    columns, rows, values = np.full(shape, -1, np.int64), np.full(shape, NO_ROW, np.int64), np.zeros(shape, np.float32)
    ends = np.zeros(warps, np.int64)
    for warp, own in enumerate(dealt):
        slot = 0
        for group, slots in own:
            for lane, row in enumerate(group):
                entries = slice(csr.indptr[first + row], csr.indptr[first + row + 1])
                step, part = np.divmod(np.arange(lengths[row]), parts)
                columns[slot + step, warp, lane, part] = csr.indices[entries]
                values[slot + step, warp, lane, part] = csr.data[entries]
                rows[slot : slot + slots, warp, lane] = row
            slot += slots
            ends[warp] |= 1 << slot - 1 if slot <= LANES else 0
    flat = (len(columns), warps * LANES)
    return _Block(columns.reshape(flat), rows.reshape(flat), values.reshape(flat), load, ends)


def _tables(block: _Block, tokens: np.ndarray, most: int, places: int) -> np.ndarray:
    """The words of a block, as they are described in ``stream.cuh``."""
    place = _places(block.columns, tokens)
    listed = np.full(most, NOTHING, np.uint32)
    listed[: len(tokens)] = tokens | place << 16
    has = block.columns >= 0
    entries = np.full(block.columns.shape, places, np.int64)
    entries[has] = place[np.searchsorted(tokens, block.columns[has])]
    entries |= block.rows << 16
    warps = len(block.used)
    both = np.stack([entries.astype(np.uint32), block.values.view(np.uint32)]).reshape(2, len(entries), warps, LANES)
    starts = 3 * warps + most + 2 * LANES * np.concatenate([[0], block.used.cumsum()[:-1]])
    own = [both[:, :used, warp].ravel() for warp, used in enumerate(block.used)]
    head = [array.astype(np.uint32) for array in (block.used, block.ends, starts)]
    return np.concatenate([*head, listed, *own]).view(np.int32)


def _places(columns: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Where each token goes: a permutation of as many places as there are, in whole rows of banks.

    A read of 4 bytes per lane takes all lanes of a warp at once, and places that agree modulo 32 share their banks; one
    of 8 bytes takes half of the lanes at a time, and modulo 16 counts.
    """
    slots, threads = columns.shape
    half = np.broadcast_to(np.arange(slots)[:, None] * (threads // 16) + np.arange(threads) // 16, columns.shape)
    has = columns >= 0
    token = np.searchsorted(tokens, columns[has])
    pairs = np.unique(np.stack([token, half[has]], axis=1), axis=0)  # token, half of a warp that reads it
    starts = np.searchsorted(pairs[:, 0], np.arange(len(tokens) + 1))
    reads = slots * threads // 16
    met = np.zeros((reads, LANES), np.int64)  # tokens at each place modulo 32, by half warp
    rows = -(-len(tokens) // LANES)
    taken = np.zeros(LANES, np.int64)
    place = np.zeros(len(tokens), np.int64)
    for one in np.argsort(-np.diff(starts), kind="stable"):
        own = pairs[starts[one] : starts[one + 1], 1]
        here, beside = met[own].sum(0), met[own ^ 1].sum(0)
        cost = 2 * here + np.roll(here, 16) + beside
        bank = int(np.where(taken < rows, cost * LANES * rows + taken, np.iinfo(np.int64).max).argmin())
        place[one] = taken[bank] * LANES + bank
        taken[bank] += 1
        met[own, bank] += 1
    return place
