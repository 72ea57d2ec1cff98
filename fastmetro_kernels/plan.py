"""How the CUDA attention kernels walk over a mesh: windows in processing order, a cache of rows managed in advance.

A block of threads works through the windows (16 rows each, see `schedule.py`) in steps of a few. The rows of k and v
that a step needs (in the backward also q and the gradient) lie in slots of shared memory. Which row enters which slot
at which step is decided here, once per topology: the access pattern is known, so the cache can be the best one
possible (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966: evict what is needed
latest; `residency.py` simulates it). `packing.py` lays the plan out as the kernels read it.

The rows of step s + 1 are copied while step s is computed, so a slot may be filled again only when neither needs it.
A block may begin at any step: `restarts` lists what the cache would hold there.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastmetro_kernels.residency import BANK_COLUMNS, Residency, Uses
from fastmetro_kernels.schedule import WINDOW_ROWS, Schedule

CHUNK_KEYS = 64
"""Keys of one tile of scores; lists are cut into chunks of so many."""

MAX_SLOTS = 400
"""Largest cache, hubs included: the backward keeps 536 bytes per slot in 227 KiB of shared memory."""


class Shape(NamedTuple):
    """How a kernel wants to walk: windows of a step (one warp each), and slots for vertices beside those of the hubs.

    Few rows are read twice with so many slots, and with 14 hubs two blocks fit on a multiprocessor of 228 KiB (heads
    of up to 64). More are taken where the lists of two steps in a row need them.
    With `resident` the slots are for all vertices, so that none is ever thrown out.
    """

    windows: int
    slots: int
    resident: bool = False


FORWARD = Shape(6, 302)
"""Eight warps, so that each may keep 128 registers: with fewer, heads of 64 do not fit."""

FORWARD_NARROW = Shape(7, 302)
"""For heads below 64, of which a warp has several to go through, one after the other, in 96 registers."""

BACKWARD = Shape(4, 184)
"""Eight warps."""

MAX_RESIDENT = 700
"""Most tokens of a mesh that lies in the cache as a whole: rows of 64 bytes, in the backward 292 bytes per slot."""

_Array = npt.NDArray[np.int64]


class Plan(NamedTuple):
    """The tensors that the kernels read, and sizes.

    Tokens are numbered hubs first. A slot is a place in the cache; slots 0 to `num_hubs - 1` hold the hubs.

    Attributes:
        steps: int32 [S, 8]: first and end of its entries in `loads`, the same for `restarts`, first and end of its
            windows, first hub chunk, number of keys of its hub chunks.
        loads: int32 [N, 2]: token and slot, copied while the step before is computed.
        restarts: int32 [M, 4]: token, slot, the step that needs it first, 0; sorted by that step.
        rows: int32 [W, 16]: the tokens of each window, -1 where there is none.
        row_slots: int32 [W, 16]: where they lie during the window's step.
        extras: int32 [W + 1]: window w has the chunk w, and the chunks W + `extras[w]` to W + `extras[w + 1]` - 1 where
            64 keys are not enough.
        lists: int16 [C + hub chunks, 16, 4]: slots of the 64 keys of a chunk, key 16 i + j at [j, i]; padding repeats
            a key. Hub chunks, the keys that the hubs meet in a step, come last.
        masks: int64 [C, 16]: bit n of row r tells whether row r of the window may use key n of the chunk.
        t_extras, t_lists, t_masks: the same for the transposed pattern (windows of keys, lists of queries); `t_masks`
            is `masks` itself where the pattern is symmetric.
        slots: size of the cache in rows.
        windows: most windows of a step.
    """

    steps: Tensor
    loads: Tensor
    restarts: Tensor
    rows: Tensor
    row_slots: Tensor
    extras: Tensor
    lists: Tensor
    masks: Tensor
    t_extras: Tensor
    t_lists: Tensor
    t_masks: Tensor
    slots: int
    windows: int


def resident_shape(num_vertices: int, num_hubs: int, backward: bool) -> Shape | None:
    """For blocks that have a multiprocessor and the whole mesh for themselves, or None where it is too large.

    There are as few steps as there can be with the warps that are left for windows: of 20 in the forward, where one
    copies and the hubs have four (with more than two tiles of 16, two per tile), and of 16 in the backward, where two
    copy and the hubs have four, then two per tile (`hub_warps` of forward_hubs.cuh, `backward_hub_warps` of
    backward.cuh). Four warps run at a time, so a step takes as long as the next multiple of four windows: of 27,
    steps of 15 and 12 take 7 times as long as a window, steps of 14 and 13 eight times.
    """
    if num_vertices + num_hubs > MAX_RESIDENT:
        return None
    tiles = -(-num_hubs // WINDOW_ROWS)
    hub_warps = max(4, 2 * tiles) if tiles else 0
    most = 16 - 2 - hub_warps if backward else min(20 - 1 - hub_warps, 16)
    windows = -(-num_vertices // WINDOW_ROWS)
    steps = max(-(-windows // most), 1)

    def rounds(size: int) -> int:
        return sum(-(-min(size, windows - begin) // 4) for begin in range(0, windows, size))

    return Shape(min(range(max(-(-windows // steps), 1), most + 1), key=rounds), num_vertices, resident=True)


def build_plan(schedule: Schedule, t_schedule: Schedule, num_hubs: int, shape: Shape = FORWARD) -> Plan | None:
    """The plan of a topology, or None where a window needs more rows than the cache can hold.

    Args:
        schedule, t_schedule: of the rows and of the transposed pattern, with the same windows; the same object where
            the pattern is symmetric.
        num_hubs: 0 to 64.
        shape: of the kernel that is to follow the plan.
    """
    windows = _windows(schedule, num_hubs)
    keys = _Keys.of(schedule, num_hubs)
    t_keys = keys if t_schedule is schedule else _Keys.of(t_schedule, num_hubs)
    limit = 2 * shape.slots if shape.resident else MAX_SLOTS - num_hubs
    present = windows >= 0
    window_of_need = np.concatenate([np.nonzero(present)[0], keys.windows(), t_keys.windows()])
    needs = np.concatenate([windows[present], keys.tokens, t_keys.tokens])
    groups = _steps(Uses.of(window_of_need, needs, len(windows)), limit, shape)
    if groups is None:
        return None
    step_of_window = np.repeat(np.arange(len(groups)), np.diff(groups, axis=1)[:, 0])
    uses = Uses.of(step_of_window[window_of_need], needs, len(groups))
    capacity = max(uses.most_at_once(), min(shape.slots, limit))
    cache = Residency(uses, windows, capacity, num_hubs)

    some_row = windows.max(axis=1, initial=-1)
    spare = cache.slots(step_of_window, some_row)  # named by places that have no row or no key
    slots = cache.slots(step_of_window[:, None], np.where(present, windows, some_row[:, None]))
    orders = _row_orders(np.where(present, slots, -1))
    windows, row_slots = (np.take_along_axis(array, orders, axis=1) for array in (windows, slots))
    extras, lists, masks = t_extras, t_lists, t_masks = _lists(keys, orders, step_of_window, cache, spare, num_hubs)
    if t_schedule is not schedule:
        t_extras, t_lists, t_masks = _lists(t_keys, orders, step_of_window, cache, spare, num_hubs)
    rows_of_step = np.bincount(step_of_window, weights=present.sum(axis=1), minlength=len(groups)).astype(np.int64)
    hub_keys, hub_lists = _hub_lists(row_slots[windows >= 0], rows_of_step, num_hubs)
    hub_chunks = -(-hub_keys // CHUNK_KEYS)
    steps = np.zeros((len(groups), 8), np.int64)
    steps[1:, 0], steps[:, 1] = cache.load_ends[:-1], cache.load_ends
    steps[1:, 2], steps[:, 3] = cache.restart_ends[:-1], cache.restart_ends
    steps[:, 4:6] = groups
    steps[:, 6] = len(lists) + np.cumsum(hub_chunks) - hub_chunks
    steps[:, 7] = hub_keys
    row_bits = torch.from_numpy(masks)
    return Plan(
        steps=_int32(steps),
        loads=_int32(cache.loads),
        restarts=_int32(cache.restarts),
        rows=_int32(windows),
        row_slots=_int32(row_slots),
        extras=_int32(extras),
        lists=_int16(np.concatenate([lists, hub_lists])),
        masks=row_bits,
        t_extras=_int32(t_extras),
        t_lists=_int16(t_lists),
        t_masks=row_bits if t_schedule is schedule else torch.from_numpy(t_masks),
        slots=capacity + num_hubs,
        windows=shape.windows,
    )


def _int32(array: _Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.int32)))


def _int16(array: _Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.int16)))


def _windows(schedule: Schedule, num_hubs: int) -> _Array:
    """int64 [W, 16]: tokens of the windows, -1 where there is none."""
    rows = schedule.row_order.cpu().numpy().astype(np.int64).reshape(-1, WINDOW_ROWS)
    return np.where(rows >= 0, rows + num_hubs, -1)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The vertex tokens that all windows list, one window after the other, and their row bits; `counts` [W]."""

    tokens: _Array
    bits: _Array
    counts: _Array

    @classmethod
    def of(cls, schedule: Schedule, num_hubs: int) -> _Keys:
        vertices = schedule.keys.cpu().numpy().astype(np.int64)
        bits = schedule.row_masks.cpu().numpy().astype(np.int64)
        padded = np.diff(schedule.key_offsets.cpu().numpy())
        listed = vertices >= 0
        windows = np.repeat(np.arange(len(padded)), padded)[listed]
        return cls(vertices[listed] + num_hubs, bits[listed], np.bincount(windows, minlength=len(padded)))

    def windows(self) -> _Array:
        """The window of each token."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def _steps(needs: Uses, limit: int, shape: Shape) -> _Array | None:
    """int64 [S, 2], first and end of consecutive windows, so few that two neighbouring steps fit together.

    `needs` tells the tokens of every window.
    """
    offsets = needs.offsets()
    if (np.diff(offsets) > limit // 2).any():
        return None
    tokens = np.split(needs.keys % needs.tokens, offsets[1:-1]) if needs.steps else []
    preferred = min(shape.slots, limit)
    groups: list[tuple[int, int]] = []
    begin, held, before = 0, set[int](), set[int]()
    for window, need in enumerate(tokens):
        together = held.union(need.tolist())
        full = window - begin == shape.windows or 2 * len(together) > limit or len(before | together) > preferred
        if window > begin and full:
            groups.append((begin, window))
            begin, together, before = window, set(need.tolist()), held
        held = together
    groups.append((begin, len(tokens)))  # hubs alone have one step without windows: they still meet each other
    return np.array(groups)


def _rectangle(values: _Array, counts: _Array, width: int) -> _Array:
    """int64 [R, width]: `counts` [R] values per row, then -1."""
    result = np.full((len(counts), width), -1)
    result[np.arange(width) < counts[:, None]] = values
    return result


def _spread(slots: _Array) -> _Array:
    """int64 [R, P]: which of the slots [R, P] (-1 behind the last) of a row stands at each place, -1 where none does.

    Eight in a row are read together, one 16-byte column of shared memory each: slots that fall into the same column
    go to different groups of eight, the most frequent columns and the emptiest groups first. Kernels go through two
    groups at a time: no more pairs of groups are used than the slots need.
    """
    groups = slots.shape[1] // BANK_COLUMNS
    needed = -(-(slots >= 0).sum(axis=1, keepdims=True) // (2 * BANK_COLUMNS)) * 2
    columns = np.where(slots >= 0, slots % BANK_COLUMNS, BANK_COLUMNS)
    members = np.argsort(columns, axis=1, kind="stable")  # by column
    sizes = (columns[:, :, None] == np.arange(BANK_COLUMNS)).sum(axis=1)
    begins = np.cumsum(sizes, axis=1) - sizes
    by_size = np.argsort(-sizes, axis=1, kind="stable")
    places = np.full((len(slots), groups, BANK_COLUMNS), -1)
    filled = np.where(np.arange(groups) < needed, 0, BANK_COLUMNS)
    for column in by_size.T[:, :, None]:
        left = np.take_along_axis(sizes, column, axis=1)
        member = np.take_along_axis(begins, column, axis=1)
        while left.any():
            targets = np.argsort(filled, axis=1, kind="stable")
            level = np.take_along_axis(filled, targets, axis=1)
            chosen = (np.arange(groups) < left) & (level < BANK_COLUMNS)
            row, rank = np.nonzero(chosen)
            group = targets[chosen]
            places[row, group, level[chosen]] = members[row, member[row, 0] + rank]
            filled[row, group] += 1
            taken = chosen.sum(axis=1, keepdims=True)
            left, member = left - taken, member + taken
    return places.reshape(slots.shape)


def _list_chunks(slots: _Array, places: _Array, spare: _Array) -> _Array:
    """int64 [R, chunks, 16, 4]: the slots [R, P] in the order in which the lanes of a warp read them.

    An empty place repeats a slot of its group of eight, which costs no extra read, or the first slot of the list, and
    where there is none, `spare` [R].
    """
    placed = np.where(places >= 0, np.take_along_axis(slots, places, axis=1), -1)
    groups = placed.reshape(len(slots), slots.shape[1] // BANK_COLUMNS, BANK_COLUMNS)
    first = np.where(groups[:, :, :1] >= 0, groups[:, :, :1], np.where(slots >= 0, slots, spare[:, None])[:, :1, None])
    groups = np.where(groups >= 0, groups, first)
    return groups.reshape(len(slots), slots.shape[1] // CHUNK_KEYS, CHUNK_KEYS // 16, 16).transpose(0, 1, 3, 2)


def _hub_lists(row_slots: _Array, rows_of_step: _Array, num_hubs: int) -> tuple[_Array, _Array]:
    """Number [S] and slots [C, 16, 4] of the keys that the hubs meet in each step.

    They are the rows of the step, of which there are `rows_of_step` [S], and in the first one the hubs themselves.
    """
    if num_hubs == 0:
        return np.zeros_like(rows_of_step), np.zeros((0, 16, 4), np.int64)
    slots = np.concatenate([np.arange(num_hubs), row_slots])
    counts = rows_of_step.copy()
    counts[0] += num_hubs
    chunks = -(-counts // CHUNK_KEYS)
    rectangle = _rectangle(slots, counts, int(chunks.max()) * CHUNK_KEYS)
    in_order = np.where(rectangle >= 0, np.arange(rectangle.shape[1]), -1)  # a count tells the kernel who is there
    lists = _list_chunks(rectangle, in_order, rectangle[:, 0])
    return counts, lists[np.arange(lists.shape[1]) < chunks[:, None]]


def _lists(
    keys: _Keys, orders: _Array, step_of_window: _Array, cache: Residency, spare: _Array, num_hubs: int
) -> tuple[_Array, _Array, _Array]:
    """Offsets of further chunks [W + 1], lists [C, 16, 4] and masks [C, 16] of all windows; lists begin with the hubs.

    A window with no key at all gets a chunk that no row may use.
    """
    windows, window_of_key = len(keys.counts), keys.windows()
    slots = cache.slots(step_of_window[window_of_key], keys.tokens)
    counts = keys.counts + num_hubs
    chunks = np.maximum(-(-counts // CHUNK_KEYS), 1)
    lists = np.empty((int(chunks.sum()), 16, 4), np.int64)
    masks = np.empty((int(chunks.sum()), WINDOW_ROWS), np.int64)
    extras = np.concatenate([[0], np.cumsum(chunks - 1)])
    for length in np.unique(chunks).tolist():
        chosen = np.flatnonzero(chunks == length)
        of_chosen = chunks[window_of_key] == length
        width = length * CHUNK_KEYS
        hubs = np.broadcast_to(np.arange(num_hubs), (len(chosen), num_hubs))
        some = keys.counts[chosen]
        own = _rectangle(slots[of_chosen], some, width - num_hubs)
        listed = np.concatenate([hubs, own], axis=1)
        places = _spread(listed)
        chunk_slots = _list_chunks(listed, places, spare[chosen])
        seen = _permuted_bits(keys.bits[of_chosen], np.repeat(orders[chosen], some, axis=0))
        bits = np.zeros((len(chosen), width), np.int64)
        bits[:, :num_hubs] = (1 << WINDOW_ROWS) - 1
        bits[:, num_hubs:] = np.maximum(_rectangle(seen, some, width - num_hubs), 0)
        bits = np.where(places >= 0, np.take_along_axis(bits, places, axis=1), 0)
        words = _transposed_bits(bits.reshape(-1, CHUNK_KEYS)).reshape(len(chosen), length, WINDOW_ROWS)
        further = (windows + extras[chosen, None] + np.arange(length - 1)).ravel()
        for target, array in ((lists, chunk_slots), (masks, words)):
            target[chosen] = array[:, 0]
            target[further] = array[:, 1:].reshape(-1, *target.shape[1:])
    return extras, lists, masks


def _row_orders(slots: _Array) -> _Array:
    """int64 [W, 16]: which row of the schedule's window stands at each place, so that eight can be read at once."""
    orders = _spread(slots)
    empty = orders < 0
    return np.where(empty, (slots >= 0).sum(axis=1, keepdims=True) + np.cumsum(empty, axis=1) - 1, orders)


def _permuted_bits(bits: _Array, orders: _Array) -> _Array:
    """Row bits of listed keys [K] for windows whose rows stand in another order [K, 16]."""
    result = np.zeros_like(bits)
    for place, row in enumerate(orders.T):
        result |= ((bits >> row) & 1) << place
    return result


def _transposed_bits(bits: _Array) -> _Array:
    """int64 [C, 16], bit n of row r, from [C, 64], bit r of key n."""
    single = (bits[:, None, :] >> np.arange(WINDOW_ROWS)[:, None]) & 1
    return np.packbits(single.astype(np.uint8), axis=2, bitorder="little").view("<i8")[:, :, 0].astype(np.int64)
