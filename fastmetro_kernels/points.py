"""Cuts of a sparse matrix for the CUDA kernel for large batches of points (``csrc/upsampling/points.cuh``).

A cut splits the rows into blocks. A block's entries are dealt to the lanes that hold them in registers, and the block
gets the list of the tokens (columns) that it touches: they are all that it reads of a batch element. A lane makes one
position (row and channel) at a time, for several batch elements.

- Where rows have three entries and few have less, as in the published steps, blocks are ranges of rows, and 32 rows of
  a warp are 96 positions in the order of memory, three for each lane.
- Other rows are grouped into patches of the mesh that cost about equally much, so that a block touches few tokens. In a
  block they are sorted by length, so that the rows of a warp are about equally long; a warp has ten of them, a position
  per lane. Rows with more entries than a lane holds are split over 2 or 4 lanes per position.

Sums are taken in the order of the other kernels (``parts_of`` in ``csrc/upsampling/launch.h``), so bits agree.

Where a token lies in shared memory is free. A lane reads the 16 bytes of one token and channel at once, and 8 lanes are
served at a time: places are chosen such that these lanes rarely meet in the same four banks (``_places``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from fastmetro_kernels.schedule import locality_order

LANES = 32
POINT = 3
PHASE = 8  # lanes that shared memory serves at a time when each reads 16 bytes
ROWS = {True: LANES, False: LANES // POINT}  # of a warp, by whether rows have three entries
SLOTS = {True: 3, False: 16}  # entries of a position that a lane holds, at most
COPIES = {True: 3, False: 4}  # words that a thread copies of a pack, at most, by whether rows have three entries
MOST_WARPS = {True: 28, False: 20}  # of a block, which leaves 72 or 96 registers to a thread
MOST_PARTS = 4
ZEROS = PHASE  # places that hold zeros, one for every residue
NO_ROW = 0xFFFFFFFF
MOST_PLACES = 0xFFFF - PHASE
MOST_NEIGHBOURS = 64  # of a row: beyond that the locality order would take long
SMALLEST = 256  # rows of a matrix that is worth its tables
ROW_COST = 4  # of a row beside its entries, in entries
SWEEPS = 3  # over the tokens of a block, each of which may move to a better place
GROUP = 32  # places that neighbours in the list of tokens have among themselves
CROWD = 30  # tokens of a group; the rest leaves room to move

CUTS = {
    True: ((8, 27), (16, 20), (32, 12), (64, 0)),
    False: ((12, 20), (16, 16), (32, 11), (64, 0), (128, 0)),
}
MOST_CUTS = 3
"""Blocks and warps of the cuts, the first that are possible, by whether rows have three entries. Few blocks read the
least; the others are for batches that would leave multiprocessors without work. More warps than there are rows for help
to copy. Fastest on an H200 for 1,723 -> 6,890 (bench/results/upsampling_points_h200.json); matrices of other sizes may
need another number of warps (0: as few as will do).
"""

_Ints = npt.NDArray[np.int64]


class Cut(NamedTuple):
    """Sizes of one cut. The order is that of ``Cut`` in ``csrc/upsampling/points.h``."""

    offset: int
    """First word of its tables."""
    blocks: int
    block_rows: int
    """Most rows of a block; where rows have three entries, all blocks but the last have so many."""
    threads: int
    slots: int
    places: int
    """Of tokens in shared memory, without those that hold zeros."""
    block_words: int
    """Size of the tables of a block."""


class _Block(NamedTuple):
    """One block: [warps, slots, rows of a warp] column (-1: none) and value of the entries; for each warp the slots
    that it uses and the lanes that share a position; [warps, rows of a warp] row, or ``NO_ROW``."""

    columns: _Ints
    values: npt.NDArray[np.float32]
    used: _Ints
    splits: _Ints
    rows: _Ints

    def first(self, warps: int) -> _Block:
        """The block without the warps behind the first ones, which have no rows."""
        return _Block(self.columns[:warps], self.values[:warps], self.used[:warps], self.splits[:warps],
                      self.rows[:warps])  # fmt: skip


def parts_of(entries: int, rows: int) -> int:
    """Lanes that share a row, as in ``csrc/upsampling/launch.h``."""
    per_row = -(-entries // rows)
    return 1 if per_row <= 4 else 2 if per_row <= 8 else 4 if per_row <= 32 else 16


def build_points(csr: sp.csr_array, cuts: Sequence[tuple[int, int]] | None = None) -> tuple[np.ndarray, list[int]]:
    """All cuts that are possible, as one int32 array and the sizes of each, one after the other.

    Args:
        csr: The matrix, columns ascending in each row.
        cuts: Blocks and warps of a block (0: as few as will do); by default `MOST_CUTS`, or none for small matrices.
    """
    threes = csr.nnz >= 2 * csr.shape[0] and int(np.diff(csr.indptr).max(initial=0)) <= POINT
    default = cuts is None
    if cuts is None:
        cuts = CUTS[threes] if csr.shape[0] >= SMALLEST else ()
    words: list[np.ndarray] = [np.zeros(0, np.int32)]
    sizes: list[int] = []
    for blocks, warps in cuts:
        made = _build_cut(csr, blocks, warps, threes)
        if made is None and default:
            made = _build_cut(csr, blocks, 0, threes)
        if made is not None:
            tables, cut = made
            sizes += cut._replace(offset=sum(map(len, words)))
            words.append(tables)
        if len(words) > MOST_CUTS:
            break
    return np.concatenate(words), sizes


def _build_cut(csr: sp.csr_array, blocks: int, warps: int, threes: bool) -> tuple[np.ndarray, Cut] | None:
    parts = parts_of(csr.nnz, csr.shape[0]) if csr.nnz else 0
    if not 0 < parts <= MOST_PARTS or warps > MOST_WARPS[threes]:
        return None
    patches = _ranges(csr.shape[0], blocks) if threes else _patches(csr, blocks)
    most = warps or MOST_WARPS[threes]
    dealt = [block for block in (_deal(csr, patch, most, parts, threes) for patch in patches) if block is not None]
    if len(dealt) < len(patches):
        return None
    lists = [_tokens(block) for block in dealt]
    placed = [_places(*_reads(block, listed), len(listed)) for block, listed in zip(dealt, lists, strict=True)]
    places = max(_padded(place) for place in placed)
    least = max(-(-places * POINT // (COPIES[threes] * LANES)), *(_warps_with_rows(block) for block in dealt))
    warps = warps or least
    if places > MOST_PLACES or not least <= warps <= MOST_WARPS[threes]:
        return None
    tables = [
        _tables(block.first(warps), listed, place, places, threes)
        for block, listed, place in zip(dealt, lists, placed, strict=True)
    ]
    block_rows = max(map(len, patches))
    cut = Cut(0, len(patches), block_rows, warps * LANES, SLOTS[threes], places, len(tables[0]))
    return np.concatenate(tables), cut


def _tokens(block: _Block) -> _Ints:
    """What the rows of a block touch, and at least something that can be copied."""
    found = np.unique(block.columns[block.columns >= 0])
    return found if len(found) else np.zeros(1, np.int64)


def _warps_with_rows(block: _Block) -> int:
    return int((block.rows != NO_ROW).any(1).sum())


def _padded(place: _Ints) -> int:
    """Places that a block copies to: so many that their words are a multiple of a warp's."""
    return -(-(1 + int(place.max())) // LANES) * LANES


def _ranges(rows: int, blocks: int) -> list[_Ints]:
    size = -(-rows // (blocks * LANES)) * LANES
    return [np.arange(start, min(start + size, rows)) for start in range(0, rows, size)]


def _patches(csr: sp.csr_array, blocks: int) -> list[np.ndarray]:
    """Rows near each other, a cut of the locality order into patches that cost about equally much."""
    pattern = sp.csr_array((np.ones(csr.nnz), csr.indices, csr.indptr), shape=csr.shape)
    order = np.arange(csr.shape[0])
    shared = np.bincount(csr.indices).astype(np.int64)  # entries of each token
    if (shared**2).sum() <= MOST_NEIGHBOURS * len(order):
        graph = sp.csr_array(pattern @ pattern.T)
        order = locality_order(torch.from_numpy(graph.indptr), torch.from_numpy(graph.indices)).numpy()
    done = np.cumsum(np.diff(csr.indptr)[order] + ROW_COST)
    cuts = np.searchsorted(done, np.arange(1, blocks) * done[-1] / blocks)
    return [np.sort(patch) for patch in np.split(order, cuts) if len(patch)]


def _deal(csr: sp.csr_array, patch: _Ints, warps: int, parts: int, threes: bool) -> _Block | None:
    """Rows of three entries in order; others sorted by length, the longest first."""
    rows, slots = ROWS[threes], SLOTS[threes]
    shape = (warps, slots, rows)
    block = _Block(np.full(shape, -1), np.zeros(shape, np.float32), np.zeros(warps, np.int64),
                   np.ones(warps, np.int64), np.full((warps, rows), NO_ROW))  # fmt: skip
    lengths = np.diff(csr.indptr)[patch].astype(np.int64)
    order = np.arange(len(patch)) if threes else np.argsort(-lengths, kind="stable")
    start = 0
    for warp in range(warps):
        if start == len(order):
            break
        longest = int(lengths[order[start]])
        splits = [split for split in (1, 2, 4) if split <= parts and _slots_of(longest, parts, split) <= slots]
        if not splits:
            return None
        split = block.splits[warp] = splits[0]
        block.used[warp] = _slots_of(longest, parts, split)
        own = order[start : start + rows // split]
        start += len(own)
        seat = np.repeat(np.arange(len(own)), lengths[own])
        entry = np.arange(len(seat)) - (np.cumsum(lengths[own]) - lengths[own])[seat]  # its number in its row
        step, part = np.divmod(entry, parts)
        at = (warp, step * (parts // split) + part // split, part % split * (rows // split) + seat)
        source = csr.indptr[patch[own]][seat] + entry
        block.columns[at], block.values[at] = csr.indices[source], csr.data[source]
        block.rows[warp, : len(own)] = patch[own]
    return block if start == len(order) else None


def _slots_of(length: int, parts: int, split: int) -> int:
    """Slots that a row takes of each of the `split` lanes, of which lane q adds up parts q, q + split..."""
    return length // parts * (parts // split) + -(-(length % parts) // split)


def _reads(block: _Block, tokens: _Ints) -> tuple[_Ints, _Ints, _Ints]:
    """Token (its number in the list), channel and phase of everything that is read, each once per phase."""
    _, slots, rows = block.columns.shape
    phases = -(-rows * POINT // LANES) * LANES // PHASE  # for all rows of a warp
    warp, slot, row = np.nonzero(block.columns >= 0)
    token = np.searchsorted(tokens, block.columns[warp, slot, row])
    channel = np.arange(POINT)[:, None]
    phase = (warp * slots + slot) * phases + _phase(POINT * row + channel)
    read = [np.tile(token, POINT), np.repeat(np.arange(POINT), len(token)), phase.ravel()]
    token, channel, phase = np.unique(np.stack(read), axis=1)
    return token, channel, phase


def _phase(position: _Ints) -> _Ints:
    """The phase of a position of a warp, as in ``position_of_lane``: 8 lanes read one channel of 8 rows, which often
    share a token; the last 8 of 32 have what is left."""
    within = position % LANES
    return position // LANES * (LANES // PHASE) + np.where(within < POINT * PHASE, within % POINT, POINT)


def _places(token: _Ints, channel: _Ints, phase: _Ints, count: int) -> _Ints:
    """Where each token goes: in the residue modulo 8 in which it meets the fewest others, the most used ones first.

    The word of channel c of place p lies in the four banks (3 p + c) mod 8, and a phase is passed as often as the
    fullest of its banks has words. So the cost grows faster than the number of those that are met. Neighbours in the
    list stay together, in groups of 32 places, because the lanes that copy neighbouring places read memory together,
    too, and every line of it that they touch takes its time.
    """
    starts = np.searchsorted(token, np.arange(count + 1))
    load = np.zeros((int(phase.max(initial=0)) + 1, PHASE), np.int64)  # words in each bank, by phase
    bank = (POINT * np.arange(PHASE)[:, None] + channel) % PHASE
    group = np.arange(count) // CROWD
    taken = np.zeros((-(-count // CROWD), PHASE), np.int64)
    residue = np.full(count, -1)
    order = np.argsort(-np.diff(starts), kind="stable")
    never = np.iinfo(np.int64).max
    for one in np.tile(order, SWEEPS):
        own, near = slice(starts[one], starts[one + 1]), taken[group[one]]
        at, banks = phase[own], bank[:, own]
        if residue[one] >= 0:
            load[at, banks[residue[one]]] -= 1
            near[residue[one]] -= 1
        met = load[at, banks]
        cost = np.where(near < GROUP // PHASE, (met * met).sum(1), never)
        best = int(cost.argmin())
        residue[one] = best
        load[at, banks[best]] += 1
        near[best] += 1
    place = np.zeros(count, np.int64)
    seats = np.zeros_like(taken)
    for one in range(count):
        seat = seats[group[one], residue[one]]
        place[one] = GROUP * group[one] + PHASE * seat + residue[one]
        seats[group[one], residue[one]] += 1
    return place


def _tables(block: _Block, tokens: _Ints, place: _Ints, places: int, threes: bool) -> np.ndarray:
    """The words of a block, as they are described in ``points.cuh``."""
    near = np.minimum(np.arange(places) // GROUP * CROWD, len(tokens) - 1)  # what is copied where no token goes
    copied = tokens[near]
    copied[place] = tokens
    word = np.zeros(block.columns.shape, np.int64)
    has = block.columns >= 0
    word[has] = POINT * place[np.searchsorted(tokens, block.columns[has])]
    head = [np.array([_padded(place)])]
    _fill_with_zeros(word, has, places)
    if not threes:
        head += [block.used | block.splits << 8, block.rows.ravel()]
    both = np.stack([word.astype(np.uint32), block.values.view(np.uint32)], axis=1)  # [warps, 2, slots, rows]
    return np.concatenate([*(array.astype(np.uint32) for array in (*head, copied)), both.ravel()]).view(np.int32)


def _fill_with_zeros(word: _Ints, has: npt.NDArray[np.bool_], places: int) -> None:
    """Slots without an entry read zeros, of the residue that meets the fewest others in its phases."""
    rows = word.shape[2]
    position = POINT * np.arange(rows)[:, None] + np.arange(POINT)  # [rows, channels]
    phase = _phase(position)
    load = np.zeros((*word.shape[:2], int(phase.max()) + 1, PHASE), np.int64)
    warp, slot, row = np.nonzero(has)
    for channel in range(POINT):
        bank = (word[warp, slot, row] + channel) % PHASE
        np.add.at(load, (warp, slot, phase[row, channel], bank), 1)
    banks = (POINT * np.arange(PHASE)[:, None] + np.arange(POINT)) % PHASE  # of [zeros, channels]
    warp, slot, row = np.nonzero(~has)
    met = load[warp[:, None, None], slot[:, None, None], phase[row][:, None], banks]
    word[warp, slot, row] = POINT * (places + (met * met).sum(2).argmin(1))
