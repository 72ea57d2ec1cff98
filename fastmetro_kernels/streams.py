"""Cuts of a sparse matrix for the CUDA kernel that streams a batch of points past it (``csrc/upsampling/stream.cuh``).

A cut splits the rows into blocks. A block's entries are dealt to the threads that hold them in registers, and the block
gets the list of the tokens (columns) that it touches: they are all that it reads of a batch element.

- Where every row has three entries, as in the published steps, blocks are ranges of rows, a row per lane, in order.
- Other rows are grouped into patches of the mesh with equally many entries, so that a block touches few tokens. In a
  block they are sorted by length, so that the lanes of a warp have equally much to do, and dealt to the warps, longest
  first. As many lanes share a row as in the other kernels (``parts_of`` in ``csrc/upsampling/launch.h``), so that sums
  are taken in the same order.

Where a token lies in shared memory is free. Places are chosen such that lanes which read or copy at the same time
rarely meet in a bank: each token takes the bank in which it meets the fewest others, the most used tokens first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from fastmetro_kernels.schedule import locality_order

LANES = 32
POINT = 3
COPIES = {True: 6, False: 8}  # by whether all rows have three entries, as in csrc/upsampling/launch.h
SLOTS = {True: (3, 6, 9), False: (8, 12, 16)}
NOTHING, NO_ROW = 0xFFFFFFFF, 0xFFFF
FULL = np.iinfo(np.int64).max  # cost of a bank that takes no more tokens
MOST_NEIGHBOURS = 64  # of a row: beyond that the locality order would take long
ROWS_UNIT = 8  # a block begins at a multiple of so many rows, in the middle of no sector of memory
SMALLEST = 256  # rows of a matrix for which a stream is worth its tables


class Cut(NamedTuple):
    """Sizes of one cut. The order is that of ``Cut`` in ``csrc/upsampling/launch.h``."""

    offset: int
    """First word of its tables."""
    blocks: int
    block_rows: int
    """Most rows of a block; where every row has three entries, all blocks but the last have so many."""
    threads: int
    slots: int
    tokens: int
    """Longest list of tokens of a block."""
    places: int
    """Of shared memory, without the one that holds zeros."""
    block_words: int
    """Size of the tables of a block."""
    kind: int = 0
    """1 of ``bulk.py``, where `tokens` are segments and `places` items of a point."""


DEFAULT_CUTS = {True: ((4, 27), (8, 9)), False: ((4, 27), (8, 27))}
"""Blocks and warps of a block, by whether all rows have three entries. 27 warps hold the rows of the body mesh (1,723
in a block of four, two for each thread) almost without a rest, and copy all of 288 tokens at a time; the second is for
small batches. Fastest of `python -m bench upsampling --variants` on an H200.
"""


def parts_of(entries: int, rows: int) -> int:
    """Lanes that share a row, as in ``csrc/upsampling/launch.h``."""
    per_row = -(-entries // rows)
    return 1 if per_row <= 4 else 2 if per_row <= 8 else 4 if per_row <= 32 else 16


def build_streams(csr: sp.csr_array, cuts: Sequence[tuple[int, int]] | None = None) -> tuple[np.ndarray, list[int]]:
    """All cuts that are possible, as one int32 array and the sizes of each, one after the other.

    Args:
        csr: The matrix, columns ascending in each row.
        cuts: Blocks and warps of a block, the latter a multiple of three; by default none for small matrices.
    """
    if cuts is None:
        threes = bool((np.diff(csr.indptr) == POINT).all())
        cuts = DEFAULT_CUTS[threes] if csr.shape[0] >= SMALLEST else ()
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
    threes = bool((np.diff(csr.indptr) == 3).all())
    patches = _ranges(rows, blocks) if threes else _patches(csr, blocks)
    block_rows = max(map(len, patches))
    if block_rows >= NO_ROW:
        return None
    deal = _deal_threes if threes else _deal_any
    dealt = [deal(csr, patch, warps, parts_of(csr.nnz, rows)) for patch in patches]
    slots = next((count for count in SLOTS[threes] if count >= max(len(block.columns) for block in dealt)), None)
    lists = [np.unique(block.columns[block.columns >= 0]) for block in dealt]
    most = max(map(len, lists))
    places = -(-most // LANES) * LANES
    if slots is None or most * POINT > COPIES[threes] * warps * LANES or places > NO_ROW:
        return None
    tables = [
        _tables(block, listed, patch, most, places, 0 if threes else block_rows)
        for block, listed, patch in zip(dealt, lists, patches, strict=True)
    ]
    block_words = max(map(len, tables))
    padded = [np.pad(table, (0, block_words - len(table))) for table in tables]
    cut = Cut(0, len(patches), block_rows, warps * LANES, slots, most, places, block_words)
    return np.concatenate(padded), cut


def _ranges(rows: int, blocks: int) -> list[np.ndarray]:
    size = -(-rows // (blocks * ROWS_UNIT)) * ROWS_UNIT
    return [np.arange(start, min(start + size, rows)) for start in range(0, rows, size)]


def _patches(csr: sp.csr_array, blocks: int, row_cost: int = 0) -> list[np.ndarray]:
    """Rows near each other, about equally many entries in each patch: a cut of the locality order. A row counts as
    `row_cost` entries more."""
    pattern = sp.csr_array((np.ones(csr.nnz), csr.indices, csr.indptr), shape=csr.shape)
    order = np.arange(csr.shape[0])
    shared = np.bincount(csr.indices).astype(np.int64)  # entries of each token
    if (shared**2).sum() <= MOST_NEIGHBOURS * len(order):
        graph = sp.csr_array(pattern @ pattern.T)
        order = locality_order(torch.from_numpy(graph.indptr), torch.from_numpy(graph.indices)).numpy()
    done = np.cumsum(np.diff(csr.indptr)[order] + row_cost)
    cuts = np.searchsorted(done, np.arange(1, blocks) * done[-1] / blocks)
    return [np.sort(patch) for patch in np.split(order, cuts) if len(patch)]


def _deal_threes(csr: sp.csr_array, patch: np.ndarray, warps: int, _: int) -> _Block:
    """Three slots per row, the rows of a warp one after the other."""
    each = -(-len(patch) // (warps * LANES))
    shape = (warps, each, LANES, 3)
    columns = np.full(warps * each * LANES * 3, -1, np.int64)
    values = np.zeros(len(columns), np.float32)
    entries = slice(csr.indptr[patch[0]], csr.indptr[patch[-1] + 1])
    count = entries.stop - entries.start
    columns[:count] = csr.indices[entries]
    values[:count] = csr.data[entries]

    def in_slots(array: np.ndarray) -> np.ndarray:
        return array.reshape(shape).transpose(1, 3, 0, 2).reshape(each * 3, warps * LANES)

    rows = np.zeros((each * 3, warps * LANES), np.int64)
    ends = sum(4 << 3 * i for i in range(each))
    return _Block(in_slots(columns), rows, in_slots(values), np.full(warps, each * 3), np.full(warps, ends))


def _deal_any(csr: sp.csr_array, patch: np.ndarray, warps: int, parts: int) -> _Block:
    """Groups of rows that fill a warp, sorted by length, each to the warp that has the least to do."""
    lengths = np.diff(csr.indptr)[patch]
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
                entries = slice(csr.indptr[patch[row]], csr.indptr[patch[row] + 1])
                step, part = np.divmod(np.arange(lengths[row]), parts)
                columns[slot + step, warp, lane, part] = csr.indices[entries]
                values[slot + step, warp, lane, part] = csr.data[entries]
                rows[slot : slot + slots, warp, lane] = row
            slot += slots
            ends[warp] |= 1 << slot - 1 if slot <= LANES else 0
    flat = (len(columns), warps * LANES)
    return _Block(columns.reshape(flat), rows.reshape(flat), values.reshape(flat), load, ends)


def _tables(
    block: _Block, tokens: np.ndarray, patch: np.ndarray, most: int, places: int, listed_rows: int
) -> np.ndarray:
    """The words of a block, as they are described in ``stream.cuh``."""
    place = _places(block.columns, tokens)
    copied, rows = np.full(most, NOTHING, np.uint32), np.zeros(listed_rows, np.uint32)
    copied[: len(tokens)] = tokens | place << 16
    rows[: len(patch)] = patch[:listed_rows]
    has = block.columns >= 0
    entries = np.full(block.columns.shape, places, np.int64)
    entries[has] = place[np.searchsorted(tokens, block.columns[has])]
    entries |= block.rows << 16
    warps = len(block.used)
    both = np.stack([entries.astype(np.uint32), block.values.view(np.uint32)]).reshape(2, len(entries), warps, LANES)
    own = [both[:, :used, warp].ravel() for warp, used in enumerate(block.used)]
    starts = 1 + 3 * warps + most + listed_rows + 2 * LANES * np.concatenate([[0], block.used.cumsum()[:-1]])
    head = [array.astype(np.uint32) for array in (np.array([len(patch)]), block.used, block.ends, starts)]
    return np.concatenate([*head, copied, rows, *own]).view(np.int32)


def _places(columns: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Where each token goes.

    A read of 4 bytes per lane takes all lanes of a warp at once, and places that agree modulo 32 share their banks; one
    of 8 bytes takes half of the lanes at a time, and modulo 16 counts. Each place is read three times, channel by
    channel. A copy takes 32 words of the list at a time, so that neighbours of a token in the list are in its way too.
    """
    slots, threads = columns.shape
    half = np.broadcast_to(np.arange(slots)[:, None] * (threads // 16) + np.arange(threads) // 16, columns.shape)
    has = columns >= 0
    pairs = np.stack([np.searchsorted(tokens, columns[has]), half[has]], axis=1)
    pairs = np.unique(pairs, axis=0)  # token, half of a warp that reads it
    starts = np.searchsorted(pairs[:, 0], np.arange(len(tokens) + 1))
    met = np.zeros((slots * threads // 16, LANES), np.int64)  # tokens in each bank, by half of a warp that reads
    copied = np.zeros((len(tokens) * POINT // LANES + 1, LANES), np.int64)  # words in each bank, by warp that copies
    banks = (np.arange(LANES)[:, None] * POINT + np.arange(POINT)) % LANES  # of the tokens at each place modulo 32
    rows = -(-len(tokens) // LANES)
    across = np.arange(LANES) ^ LANES // 2  # the place that agrees modulo 16
    taken = np.zeros(LANES, np.int64)
    place = np.zeros(len(tokens), np.int64)
    for one in np.argsort(-np.diff(starts), kind="stable"):
        own = pairs[starts[one] : starts[one + 1], 1]
        here, copy = met[own].sum(0), copied[one * POINT // LANES]
        cost = 3 * (2 * here + here[across] + met[own ^ 1].sum(0)) + copy[banks].sum(1)
        bank = int(np.where(taken < rows, cost * LANES * rows + taken, FULL).argmin())
        place[one] = taken[bank] * LANES + bank
        taken[bank] += 1
        met[own, bank] += 1
        copy[banks[bank]] += 1
    return place
