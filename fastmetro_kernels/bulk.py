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

from fastmetro_kernels.points import build_points
from fastmetro_kernels.streams import LANES, POINT, SMALLEST, Cut, build_streams

UNIT = 8  # tokens: segments begin and end at multiples, so that all begin equally far from a multiple of 16 bytes
GAP = 8  # tokens that may be copied in vain where that joins two segments; more where there would be too many
PAD = 8  # items of room behind a segment, for a first byte that is no multiple of 16
SEGMENTS = LANES
NO_ROW = 0x3FFF
NONE = 0xFFFFFFFF
HEADER = 5
MASKS = 4  # of a warp: after which slots rows end, and which of these add up 2, 4 and 8 lanes
SLOTS = {True: (3, 6, 9, 12, 18, 27), False: (8, 12, 16, 18, 24)}  # by whether all rows have three entries
MOST_WARPS = {12: 32, 18: 28, 27: 24}  # by slots at most, as `bulk_threads` in csrc/upsampling/bulk.cuh
EXCHANGES = 12  # of rows between tasks that are tried, per task
CANDIDATES = 256  # rows that are tried for a lane
LEVELS = (1, 2, 4, 8)  # lanes that may share a row

BULK = 1  # kind of a cut
DEFAULT_CUTS: dict[bool, tuple[tuple[int, int], ...]] = {True: (), False: ((2, 24), (4, 12))}
"""Blocks and warps of a block, by whether all rows have three entries: those are streamed faster (measured on an H200).
Large batches are fastest with two blocks, small ones with four.
"""

_Ints = npt.NDArray[np.int64]
_Placed = tuple[int, _Ints, _Ints]
"""A row, and slot and part (lane of the row) of each of its entries."""


def build_tables(csr: sp.csr_array) -> tuple[np.ndarray, list[int]]:
    """The cuts of all kernels as one int32 array, and the sizes of each, one after the other: as ``build_streams``."""
    words, sizes = build_points(csr)
    width = len(Cut._fields)
    for build in (build_bulk, build_streams):
        more, more_sizes = build(csr)
        for start in range(0, len(more_sizes), width):
            cut = Cut(*more_sizes[start : start + width])
            sizes += cut._replace(offset=cut.offset + len(words))
        words = np.concatenate([words, more])
    return words, sizes


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
    tokens = csr.shape[1]
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
    best: tuple[int, list[tuple[int, int, int]]] | None = None
    limits = (POINT,) if threes else _limits(lengths, warps)
    for limit in limits:
        groups = _groups(lengths, limit)
        load = _balance([_cost(slots, lanes) for slots, lanes, _ in groups], warps)[1]
        if best is None or load.max() < best[0]:
            best = int(load.max()), groups
    assert best is not None
    tasks = _arrange(csr, items, nothing, best[1], threes)
    owner, _ = _balance([_cost(len(task.items), task.lanes) for task in tasks], warps)
    return [[task for task, own in zip(tasks, owner, strict=True) if own == warp] for warp in range(warps)]


def _limits(lengths: _Ints, warps: int) -> list[int]:
    """Of the entries of one lane, to be tried. Rows of more than 8 lanes do not exist."""
    mean = int(lengths.sum()) // (warps * LANES) + 1
    least = -(-int(lengths.max(initial=1)) // LEVELS[-1])
    tried = (mean // 3, mean // 2, 2 * mean // 3, 3 * mean // 4, mean, mean + 1, mean + 2)
    return sorted({max(least, limit, 1) for limit in tried})


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


def _arrange(
    csr: sp.csr_array, items: _Ints, nothing: int, groups: Sequence[tuple[int, int, int]], threes: bool
) -> list[_Task]:
    """Rows for each task, and a slot for each of their entries."""
    lengths = np.diff(csr.indptr).astype(np.int64)
    own = np.zeros((len(lengths), int(lengths.max(initial=0))), np.int64)
    values = np.zeros(own.shape, np.float32)
    within = np.arange(own.shape[1])[None, :] < lengths[:, None]
    own[within], values[within] = items, csr.data
    chosen = _choose_threes(own, nothing, groups) if threes else _choose_any(own, lengths, groups)
    tasks = []
    for (slots, lanes, _), rows in zip(groups, chosen, strict=True):
        shape = (slots, LANES)
        task = _Task(np.full(shape, nothing), np.zeros(shape, np.float32), np.full(LANES, NO_ROW), lanes)
        for lane, (row, slot, part) in zip(range(0, LANES, lanes), rows, strict=False):
            count = int(lengths[row])
            task.items[slot, lane + part], task.values[slot, lane + part] = own[row, :count], values[row, :count]
            task.rows[lane] = row
        for one in task.items:  # lanes without an entry read zeros from the bank that disturbs the fewest
            used = np.bincount(np.unique(one[one != nothing]) % LANES, minlength=LANES)
            one[one == nothing] = nothing + (int(used.argmin()) - nothing) % LANES
        tasks.append(task)
    return tasks


def _choose_threes(items: _Ints, nothing: int, groups: Sequence[tuple[int, int, int]]) -> list[list[_Placed]]:
    """For rows of three entries, items [rows, 3]. Lane by lane the row is taken that meets the fewest others in the
    banks that it is read from and written to. Lanes that read the same token do not disturb each other: with three
    slots that is what helps most."""
    left = np.arange(len(items))
    found = []
    orders = np.array(list(itertools.permutations(range(POINT))))
    for _, _, count in groups:
        met = np.zeros((POINT, LANES), np.int64)  # tokens in each bank, by slot
        seen = np.zeros((POINT, nothing), bool)  # which items are read
        written = np.zeros(LANES, np.int64)  # rows in each bank
        placed = []
        for _ in range(count):
            near = left[:CANDIDATES]
            own = items[near]
            each = np.stack([np.where(seen[slot][own], -1, 2 * met[slot][own % LANES] ** 2) for slot in range(POINT)])
            # [orders, rows]: entry e of the row in slot order[e]
            cost = sum(each[orders[:, entry], :, entry] for entry in range(POINT)) + 2 * written[near % LANES]
            order, at = np.unravel_index(int(cost.argmin()), cost.shape)
            slots, row = orders[order], int(near[at])
            banks = items[row] % LANES
            met[slots, banks] += ~seen[slots, items[row]]
            seen[slots, items[row]] = True
            written[row % LANES] += 1
            placed.append((row, slots, np.zeros(POINT, np.int64)))
            left = np.delete(left, at)
        found.append(placed)
    return found


def _choose_any(items: _Ints, lengths: _Ints, groups: Sequence[tuple[int, int, int]]) -> list[list[_Placed]]:
    """For rows of any length. The entries of a task are edges between lanes and banks, slots their colors: if no bank
    has more entries than there are slots, no two of them need to meet (König). So rows that fit into each other's
    places are exchanged between tasks while that takes entries from too full banks."""
    rng = np.random.default_rng(0)
    counts = np.zeros((len(lengths), LANES), np.int64)
    for entry in range(items.shape[1]):
        counts[np.arange(len(lengths)), items[:, entry] % LANES] += lengths > entry
    row_at = np.argsort(-lengths, kind="stable")  # by seat
    task_of = np.repeat(np.arange(len(groups)), [count for _, _, count in groups])
    slots = np.array([group[0] for group in groups])
    room = (slots * np.array([group[1] for group in groups]))[task_of]
    load = np.zeros((len(groups), LANES), np.int64)
    np.add.at(load, task_of, counts[row_at])

    def excess(loads: _Ints, task: _Ints) -> _Ints:
        return (np.maximum(loads - slots[task][..., None], 0) ** 2).sum(-1)

    for _ in range(EXCHANGES * len(groups)):
        now = excess(load, np.arange(len(groups)))
        if not now.any():
            break
        task = int(rng.choice(np.flatnonzero(now)))
        seats = np.flatnonzero(task_of == task)
        mine = rng.choice(seats, (8, 1))
        theirs = rng.integers(len(row_at), size=(1, 64))
        fits = (lengths[row_at[theirs]] <= room[mine]) & (lengths[row_at[mine]] <= room[theirs])
        fits &= task_of[theirs] != task
        moved = counts[row_at[theirs]] - counts[row_at[mine]]
        other = task_of[theirs] + 0 * mine
        change = excess(load[task] + moved, np.full(other.shape, task)) + excess(load[other] - moved, other)
        change -= now[task] + now[other]
        change[~fits] = 1
        a, b = np.unravel_index(int(change.argmin()), change.shape)
        if change[a, b] > 0:
            continue
        load[task] += moved[a, b]
        load[other[a, b]] -= moved[a, b]
        one, two = int(mine[a, 0]), int(theirs[0, b])
        row_at[[one, two]] = row_at[[two, one]]
    found = []
    for task, (count, lanes, _) in enumerate(groups):
        rows = row_at[task_of == task]
        parts = [np.arange(lengths[row]) % lanes for row in rows]
        lane = np.concatenate([index * lanes + part for index, part in enumerate(parts)])
        banks = np.concatenate([items[row, : lengths[row]] % LANES for row in rows])
        colors = np.split(_colors(lane, banks, count), np.cumsum(lengths[rows])[:-1])
        found.append([(int(row), color, part) for row, color, part in zip(rows, colors, parts, strict=True)])
    return found


def _colors(lanes: _Ints, banks: _Ints, count: int) -> _Ints:
    """A color of `count` for each edge between a lane and a bank, of which no two at a lane agree.

    At a bank no two agree either, as long as it has up to `count` edges; those beyond it get the first colors where
    that can be, so that few colors come twice. Where the ends of an edge have no free color in common, and where an
    edge is to change its color, two colors change places along a path.
    """
    seen = np.zeros(LANES, np.int64)
    node_of = []  # of the edge: its bank, or one of 32 others for the edges that are too many
    for bank in banks.tolist():
        node_of.append(bank + LANES * int(seen[bank] // count))
        seen[bank] += 1
    lane_of = lanes.tolist()
    ends = (lane_of, node_of)
    at = [[[-1] * count for _ in range(LANES)], [[-1] * count for _ in range(int(max(node_of, default=0)) + 1)]]
    colors = [-1] * len(lane_of)

    def path(side: int, node: int, one: int, other: int) -> list[int]:
        """Edges of color `one`, `other`, `one`... from a node on."""
        found: list[int] = []
        while (edge := at[side][node][one]) >= 0 and (not found or edge != found[0]):
            found.append(edge)
            side, one, other = 1 - side, other, one
            node = ends[side][edge]
        return found

    def swap(edges: list[int], one: int, other: int) -> None:
        for edge in edges:
            for side in (0, 1):
                at[side][ends[side][edge]][colors[edge]] = -1
        for edge in edges:
            colors[edge] = one + other - colors[edge]
            for side in (0, 1):
                at[side][ends[side][edge]][colors[edge]] = edge

    for edge, (lane, node) in enumerate(zip(lane_of, node_of, strict=True)):
        free = [color for color in range(count) if at[0][lane][color] < 0]
        color = next((color for color in free if at[1][node][color] < 0), free[0])
        if at[1][node][color] >= 0:
            other = at[1][node].index(-1)
            swap(path(1, node, color, other), color, other)
        colors[edge] = color
        at[0][lane][color] = at[1][node][color] = edge
    for node in range(LANES, len(at[1])):
        for color, edge in enumerate([edge for edge in at[1][node] if edge >= 0]):
            if colors[edge] != color and at[1][node][color] < 0:
                found = path(1, node, colors[edge], color)
                if node_of[found[-1]] < LANES or len(found) == 1:
                    swap(found, colors[edge], color)
    return np.array(colors, np.int64)


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
    starts = np.concatenate([[0], np.cumsum(list(map(len, own)))[:-1]])
    starts += HEADER + 3 * SEGMENTS + (2 + MASKS) * len(block)
    front = [begin, end - begin, len(segments.first), head, tail]
    words = [np.array(front), listed.ravel(), np.array(used), starts, masks.ravel()]
    return np.concatenate([*(array.astype(np.uint32) for array in words), *own]).view(np.int32)
