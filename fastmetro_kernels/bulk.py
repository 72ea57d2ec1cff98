"""Cuts of a sparse matrix for the CUDA kernel that copies points in bulk (``csrc/upsampling/bulk.cuh``).

As in ``streams.py`` a block holds the entries of its rows in registers, but it does not pick the tokens that they
touch: the copy engine brings whole runs of them, as they lie in memory, and takes whole runs of rows away. So

- a block's rows follow each other in memory, about equally many entries in each block;
- its tokens are covered by at most 32 segments, one for each lane that asks for copies;
- which lane takes which row, and in which order it reads the row's entries, is free, because sums go to memory by way
  of shared memory. Both are chosen such that lanes which read at the same time rarely meet in a bank: where a token
  lies is not free here.

A row of up to ``limit`` entries belongs to one lane, a longer one to 2, 4 or 8, which add up their parts in a tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fastmetro_kernels.streams import LANES, POINT, SMALLEST, Cut, build_streams

UNIT = 8  # tokens: segments begin and end at multiples, so that all begin equally far from a multiple of 16 bytes
GAP = 8  # tokens that may be copied in vain where that joins two segments; more where there would be too many
PAD = 8  # items of room behind a segment, for a first byte that is no multiple of 16
SEGMENTS = LANES
NO_ROW = 0x3FFF
NONE = 0xFFFFFFFF
HEADER = 5
MASKS = 4  # of a warp: after which slots rows end, and which of these add up 2, 4 and 8 lanes
SLOTS = {True: (3, 6, 9, 12, 18, 27), False: (8, 12, 16, 24, 28)}  # by whether all rows have three entries
MOST_WARPS = {12: 32, 18: 28, 28: 24}  # by slots at most, as `bulk_threads` in csrc/upsampling/bulk.cuh
FEW = 3  # slots
FULL_BANK = 1000  # cost of an entry in a bank that has one for each slot already
FULL = np.iinfo(np.int64).max
CANDIDATES = 256  # rows that are tried for a lane
LEVELS = (1, 2, 4, 8)  # lanes that may share a row

BULK = 1  # kind of a cut
DEFAULT_CUTS = {True: ((4, 18), (8, 9)), False: ((2, 24), (4, 16))}

_Ints = npt.NDArray[np.int64]


def build_tables(csr: sp.csr_array) -> tuple[np.ndarray, list[int]]:
    """The cuts of both kernels as one int32 array, and the sizes of each, one after the other: see ``build_streams``."""
    words, sizes = build_bulk(csr)
    more, more_sizes = build_streams(csr)
    width = len(Cut._fields)
    for start in range(0, len(more_sizes), width):
        cut = Cut(*more_sizes[start : start + width])
        sizes += cut._replace(offset=cut.offset + len(words))
    return np.concatenate([words, more]), sizes


def build_bulk(csr: sp.csr_array, cuts: Sequence[tuple[int, int]] | None = None) -> tuple[np.ndarray, list[int]]:
    """All cuts that are possible, as one int32 array and the sizes of each, one after the other.

    Args:
        csr: The matrix, columns ascending in each row.
        cuts: Blocks and warps of a block; by default none for small matrices.
    """
    threes = _has_threes(csr)
    if cuts is None:
        cuts = DEFAULT_CUTS[threes] if csr.shape[0] >= SMALLEST else ()
    words: list[np.ndarray] = [np.zeros(0, np.int32)]
    sizes: list[int] = []
    for blocks, warps in cuts:
        made = _build_cut(csr, blocks, warps, threes)
        if made is not None:
            tables, cut = made
            sizes += cut._replace(offset=sum(map(len, words)))
            words.append(tables)
    return np.concatenate(words), sizes


def _has_threes(csr: sp.csr_array) -> bool:
    return csr.nnz > 0 and bool((np.diff(csr.indptr) == POINT).all())


class _Segments(NamedTuple):
    """[n] first token, tokens, and first item in shared memory of each."""

    first: _Ints
    tokens: _Ints
    place: _Ints

    @property
    def items(self) -> int:
        """Of shared memory, all segments and the room behind them."""
        return int(self.place[-1] + POINT * self.tokens[-1] + PAD)

    def items_of(self, tokens: _Ints) -> _Ints:
        """Where the first channel of each token lies."""
        segment = np.searchsorted(self.first, tokens, "right") - 1
        return self.place[segment] + POINT * (tokens - self.first[segment])


class _Task(NamedTuple):
    """Rows of a warp that end in the same slot: [slots, 32] item and value of the entries, [32] row or ``NO_ROW``."""

    items: _Ints
    values: npt.NDArray[np.float32]
    rows: _Ints
    lanes: int  # that share a row


def _build_cut(csr: sp.csr_array, blocks: int, warps: int, threes: bool) -> tuple[np.ndarray, Cut] | None:
    rows, tokens = csr.shape
    most_items = POINT * tokens + (PAD + POINT * UNIT) * SEGMENTS
    if csr.nnz == 0 or most_items > 0xFFFF or not 0 < warps <= max(MOST_WARPS.values()):
        return None
    ranges = _ranges(csr, blocks)
    if max(end - begin for begin, end in ranges) >= NO_ROW:
        return None
    segments = [_segments(np.unique(csr.indices[csr.indptr[begin] : csr.indptr[end]])) for begin, end in ranges]
    stage = max(one.items for one in segments)
    dealt = []
    for (begin, end), one in zip(ranges, segments, strict=True):
        part = sp.csr_array(csr[begin:end])
        dealt.append(_deal(part, one.items_of(part.indices.astype(np.int64)), stage, warps, threes))
    longest = max(sum(len(task.items) for task in own) for block in dealt for own in block)
    slots = next((count for count in SLOTS[threes] if count >= longest), None)
    if slots is None or warps > next(count for most, count in MOST_WARPS.items() if slots <= most):
        return None
    tables = [
        _tables(block, one, begin, end, tokens, slots if threes else 0, stage)
        for block, one, (begin, end) in zip(dealt, segments, ranges, strict=True)
    ]
    words = max(map(len, tables))
    padded = [np.pad(table, (0, words - len(table))) for table in tables]
    block_rows = max(end - begin for begin, end in ranges)
    cut = Cut(0, len(ranges), block_rows, warps * LANES, slots, SEGMENTS, stage, words, BULK)
    return np.concatenate(padded), cut


def _ranges(csr: sp.csr_array, blocks: int) -> list[tuple[int, int]]:
    """First row and end of each block; they begin at multiples of 8 rows, as segments do."""
    cuts = np.searchsorted(csr.indptr, np.arange(1, blocks) * csr.nnz / blocks)
    bounds = np.unique(np.concatenate([[0], (cuts + UNIT // 2) // UNIT * UNIT, [csr.shape[0]]]).clip(0, csr.shape[0]))
    return [(int(begin), int(end)) for begin, end in itertools.pairwise(bounds)]


def _segments(tokens: _Ints) -> _Segments:
    if len(tokens) == 0:
        tokens = np.zeros(1, np.int64)
    units, gap = np.unique(tokens // UNIT), GAP // UNIT
    while True:
        breaks = np.flatnonzero(np.diff(units) > gap + 1)
        if len(breaks) < SEGMENTS:
            break
        gap += 1
    first = UNIT * units[np.concatenate([[0], breaks + 1])]
    count = UNIT * (units[np.concatenate([breaks, [len(units) - 1]])] + 1) - first
    place = np.concatenate([[0], np.cumsum(POINT * count + PAD)[:-1]])
    return _Segments(first, count, place)


def _deal(csr: sp.csr_array, items: _Ints, nothing: int, warps: int, threes: bool) -> list[list[_Task]]:
    """The tasks of each warp: long ones first, each to the warp that has the least to do."""
    lengths = np.diff(csr.indptr).astype(np.int64)
    best: tuple[int, list[_Task]] | None = None
    limits = (POINT,) if threes else _limits(lengths, warps)
    for limit in limits:
        groups = _groups(lengths, limit)
        load = _balance([_cost(slots, lanes) for slots, lanes, _ in groups], warps)[1]
        if best is None or load.max() < best[0]:
            best = int(load.max()), groups
    assert best is not None
    tasks = _arrange(csr, items, nothing, best[1])
    owner, _ = _balance([_cost(len(task.items), task.lanes) for task in tasks], warps)
    return [[task for task, own in zip(tasks, owner, strict=True) if own == warp] for warp in range(warps)]


def _limits(lengths: _Ints, warps: int) -> list[int]:
    """Of the entries of one lane, to be tried. Rows of more than 8 lanes do not exist."""
    mean = int(lengths.sum()) // (warps * LANES) + 1
    least = -(-int(lengths.max(initial=1)) // LEVELS[-1])
    return sorted({max(least, limit) for limit in (mean // 3, mean // 2, 2 * mean // 3, 3 * mean // 4, mean, mean + 1, mean + 2) if limit > 0})


def _groups(lengths: _Ints, limit: int) -> list[tuple[int, int, int]]:
    """Slots, lanes of a row and number of rows of each task, longest rows first; ``_arrange`` says which rows."""
    found = []
    order = np.sort(lengths)[::-1]
    start = 0
    while start < len(order):
        lanes = next(count for count in LEVELS if count * limit >= order[start])
        slots = max(1, -(-int(order[start]) // lanes))
        # Shorter rows that one lane less would hold do not mix with those.
        stop = start + LANES // lanes
        found.append((slots, lanes, min(stop, len(order)) - start))
        start = stop
    return found


def _cost(slots: int, lanes: int) -> int:
    """Of a task, in instructions."""
    return 7 * slots + 6 * LEVELS.index(lanes) + 10


def _balance(costs: Sequence[int], warps: int) -> tuple[_Ints, _Ints]:
    """Warp of each task, and what each warp has to do."""
    load = np.zeros(warps, np.int64)
    owner = np.zeros(len(costs), np.int64)
    for task in np.argsort(-np.array(costs), kind="stable"):
        owner[task] = int(load.argmin())
        load[owner[task]] += costs[task]
    return owner, load


def _arrange(csr: sp.csr_array, items: _Ints, nothing: int, groups: Sequence[tuple[int, int, int]]) -> list[_Task]:
    """Rows for each task. Lane by lane the row is taken, among those that fit, that meets the fewest others in the banks
    that its entries are read from; then each entry gets its slot."""
    lengths = np.diff(csr.indptr).astype(np.int64)
    left = np.argsort(-lengths, kind="stable")
    longest = int(lengths.max(initial=0))
    own = np.zeros((len(lengths), longest), np.int64)
    values = np.zeros(own.shape, np.float32)
    within = np.arange(longest)[None, :] < lengths[:, None]
    own[within], values[within] = items, csr.data
    room = np.array([slots * lanes for slots, lanes, count in groups for _ in range(count)])
    tasks, seat = [], 0
    for slots, lanes, count in groups:
        reads = (_Few if slots <= FEW else _Many)(slots, lanes, nothing)
        written = np.zeros(LANES, np.int64)  # rows in each bank
        rows = []
        for _ in range(count):
            # Who comes before the chosen one moves to the next seat, which must be long enough.
            after = min(CANDIDATES, len(left)) - 1
            fits = lengths[left[:after]] <= room[seat + 1 : seat + 1 + after]
            candidates = left[: after + 1 if fits.all() else int(fits.argmin()) + 1]
            chosen = reads.take(own[candidates], lengths[candidates], 2 * written[candidates % LANES])
            row = int(candidates[chosen])
            rows.append(row)
            written[row % LANES] += 1
            left = np.delete(left, chosen)
            seat += 1
        if isinstance(reads, _Many):
            left = reads.exchange(rows, left, own, lengths)
        task = _Task(np.full((slots, LANES), nothing), np.zeros((slots, LANES), np.float32), np.full(LANES, NO_ROW), lanes)
        for lane, row, (slot, part) in zip(range(0, LANES, lanes), rows, reads.places(), strict=False):
            count = int(lengths[row])
            task.items[slot, lane + part], task.values[slot, lane + part] = own[row, :count], values[row, :count]
            task.rows[lane] = row
        for one in task.items:  # lanes without an entry read zeros from the bank that disturbs the fewest
            used = np.bincount(np.unique(one[one != nothing]) % LANES, minlength=LANES)
            one[one == nothing] = nothing + (int(used.argmin()) - nothing) % LANES
        tasks.append(task)
    return tasks


class _Few:
    """A task of few slots: lanes that read one and the same token at once do not disturb each other, which is what
    helps most. Row by row each entry goes to the slot where it meets the fewest."""

    def __init__(self, slots: int, lanes: int, nothing: int) -> None:
        self.met = np.zeros((slots, LANES), np.int64)  # tokens in each bank
        self.seen = np.zeros((slots, nothing), bool)  # which items are read
        self.lanes = lanes
        self.found: list[tuple[_Ints, _Ints]] = []

    def take(self, items: _Ints, lengths: _Ints, extra: _Ints) -> int:
        """The best one of some rows [n, length of the longest], each of which has `extra` costs."""
        room = np.full((len(items), len(self.met)), self.lanes, np.int64)
        slot = np.zeros(items.shape, np.int64)
        cost = extra.copy()
        every = np.arange(len(items))
        for entry in range(int(lengths.max(initial=0))):
            met = np.where(self.seen[:, items[:, entry]], -1, 2 * self.met[:, items[:, entry] % LANES] ** 2).T
            met = np.where(room > 0, met, 1 << 20)
            slot[:, entry] = met.argmin(1)
            has = lengths > entry
            cost += np.where(has, met[every, slot[:, entry]], 0)
            room[every, slot[:, entry]] -= has
        chosen = int(cost.argmin())
        slots = slot[chosen, : lengths[chosen]]
        parts = np.array([int((slots[:entry] == at).sum()) for entry, at in enumerate(slots)], np.int64)
        self.found.append((slots, parts))
        for at, item in zip(slots, items[chosen], strict=False):
            self.met[at, item % LANES] += not self.seen[at, item]
            self.seen[at, item] = True
        return chosen

    def places(self) -> list[tuple[_Ints, _Ints]]:
        """Slot and part of every entry of each row."""
        return self.found


class _Many:
    """A task of many slots: entries are the edges between lanes and banks, slots their colors. If no bank has more
    entries than there are slots, no two of them need to meet (König), so rows are taken that fill the banks evenly."""

    def __init__(self, slots: int, lanes: int, _: int) -> None:
        self.slots, self.lanes = slots, lanes
        self.load = np.zeros(LANES, np.int64)
        self.banks: list[_Ints] = []

    def take(self, items: _Ints, lengths: _Ints, extra: _Ints) -> int:
        """As of `_Few`."""
        has = np.arange(items.shape[1])[None, :] < lengths[:, None]
        load = self.load[items % LANES]
        cost = np.where(has, load**2 + FULL_BANK * (load >= self.slots), 0).sum(1) / np.maximum(lengths, 1)
        chosen = int((cost + extra).argmin())
        self.banks.append(items[chosen, : lengths[chosen]] % LANES)
        np.add.at(self.load, self.banks[-1], 1)
        return chosen

    def exchange(self, rows: list[int], left: _Ints, items: _Ints, lengths: _Ints) -> _Ints:
        """Exchanges rows of the task for others of the same length while that takes something from too full banks."""
        others = left[:CANDIDATES].copy()
        both = np.concatenate([np.array(rows), others])
        counts = np.zeros((len(both), LANES), np.int64)
        for entry in range(items.shape[1]):
            counts[np.arange(len(both)), items[both, entry] % LANES] += lengths[both] > entry
        mine, theirs = counts[: len(rows)], counts[len(rows) :]
        differ = lengths[np.array(rows)][:, None] != lengths[others][None, :]
        while len(others) and (over := int(np.maximum(self.load - self.slots, 0).sum())):
            moved = self.load + theirs[None] - mine[:, None]
            found = np.where(differ, FULL, np.maximum(moved - self.slots, 0).sum(2))
            here, there = np.unravel_index(int(found.argmin()), found.shape)
            if found[here, there] >= over:
                break
            self.load = moved[here, there]
            rows[here], others[there] = int(others[there]), rows[here]
            mine[here], theirs[there] = theirs[there].copy(), mine[here].copy()
        self.banks = [items[row, : lengths[row]] % LANES for row in rows]
        return np.concatenate([others, left[CANDIDATES:]])

    def places(self) -> list[tuple[_Ints, _Ints]]:
        """Slot and part of every entry of each row."""
        lanes = [(row * self.lanes + np.arange(len(banks)) % self.lanes) for row, banks in enumerate(self.banks)]
        colors = _colors(np.concatenate(lanes), np.concatenate(self.banks), self.slots)
        bounds = np.cumsum([len(banks) for banks in self.banks])[:-1]
        return [(slot, lane % self.lanes) for slot, lane in zip(np.split(colors, bounds), lanes, strict=True)]


def _colors(lanes: _Ints, banks: _Ints, count: int) -> _Ints:
    """A color for each edge, of which no two at a lane agree, and where possible none at a bank: where the two ends of
    an edge have no free color in common, two colors change places along a path. No lane has more than `count` edges."""
    at = np.full((2, LANES, count), -1, np.int64)  # the edge of each color at a lane, at a bank
    color = np.full(len(lanes), -1, np.int64)
    ends = np.stack([lanes, banks])
    spilled = []
    for edge, (lane, bank) in enumerate(ends.T.tolist()):
        free = [np.flatnonzero(at[0, lane] < 0), np.flatnonzero(at[1, bank] < 0)]
        if len(free[1]) == 0:
            spilled.append(edge)
            continue
        both = np.intersect1d(*free, assume_unique=True)
        if len(both):
            chosen = int(both[0])
        else:
            chosen, other = int(free[0][0]), int(free[1][0])
            # From the bank along edges of color `chosen`, `other`, `chosen`...: it never ends at the lane.
            path, side, node, step = [], 1, bank, chosen
            while (next_edge := int(at[side, node, step])) >= 0:
                path.append(next_edge)
                side = 1 - side
                node, step = int(ends[side, next_edge]), chosen + other - step
            for one in path:
                at[[0, 1], ends[:, one], color[one]] = -1
            for one in path:
                color[one] = chosen + other - color[one]
                at[[0, 1], ends[:, one], color[one]] = one
        color[edge] = chosen
        at[0, lane, chosen] = at[1, bank, chosen] = edge
    met = np.zeros((count, LANES), np.int64)
    np.add.at(met, (color[color >= 0], banks[color >= 0]), 1)
    for edge in spilled:  # of banks with more entries than slots: as many as possible in the same slots
        free = np.flatnonzero(at[0, lanes[edge]] < 0)
        color[edge] = free[(met[free, banks[edge]] * LANES - met[free].max(1)).argmin()]
        met[color[edge], banks[edge]] += 1
        at[0, lanes[edge], color[edge]] = edge
    return color


def _tables(
    block: list[list[_Task]], segments: _Segments, begin: int, end: int, tokens: int, fixed: int, nothing: int
) -> np.ndarray:
    """The words of a block, as they are described in ``bulk.cuh``. `fixed`: slots of every warp, 0 if they differ."""
    last = tokens - 1
    reaches = segments.first[0] == 0, segments.first[-1] + segments.tokens[-1] > last
    head = segments.place[0] if reaches[0] else NONE
    tail = segments.items_of(np.array([last]))[0] + POINT - 1 if reaches[1] else NONE
    listed = np.zeros((3, SEGMENTS), np.int64)
    listed[:, : len(segments.first)] = segments
    used, masks, own = [], np.zeros((MASKS, len(block)), np.int64), []
    for warp, tasks in enumerate(block):
        slots = 0
        entries, values = [np.zeros((0, LANES), np.int64)], [np.zeros((0, LANES), np.float32)]
        for task in tasks:
            slots += len(task.items)
            for level in range(MASKS):
                masks[level, warp] |= (task.lanes >= LEVELS[level]) << slots - 1
            entries.append(task.items << 16 | task.rows)
            values.append(task.values)
        if slots < fixed:
            entries.append(np.full((fixed - slots, LANES), nothing << 16 | NO_ROW))
            values.append(np.zeros((fixed - slots, LANES), np.float32))
            slots = fixed
        used.append(slots)
        both = np.concatenate(entries).astype(np.uint32), np.concatenate(values).view(np.uint32)
        own.append(np.stack(both).ravel())
    starts = HEADER + 3 * SEGMENTS + (2 + MASKS) * len(block) + np.concatenate([[0], np.cumsum(list(map(len, own)))[:-1]])
    front = [begin, end - begin, len(segments.first), head, tail]
    words = [np.array(front), listed.ravel(), np.array(used), starts, masks.ravel()]
    return np.concatenate([*(array.astype(np.uint32) for array in words), *own]).view(np.int32)
