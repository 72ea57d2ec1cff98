"""How the CUDA attention kernels walk over a mesh: windows in processing order, a cache of rows managed in advance.

A block of threads works through the windows (16 rows each, see `schedule.py`) in steps of a few. The rows of k and v
that a step needs (in the backward also q and the gradient) lie in slots of shared memory. Which row enters which slot
at which step is decided here, once per topology: the access pattern is known, so the cache can be the best one
possible (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966: evict what is needed
latest). On the published body meshes every row is read 1.0 to 1.15 times. `packing.py` lays the plan out as the kernels
read it.

The rows of step s + 1 are copied while step s is computed, so a slot may be filled again only when neither needs it.
A block may begin at any step: `restarts` lists what the cache would hold there.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastmetro_kernels.schedule import WINDOW_ROWS, Schedule

CHUNK_KEYS = 64
"""Keys of one tile of scores; lists are cut into chunks of so many."""

_BANK_COLUMNS = 8  # shared memory is read 128 bytes at a time: eight pieces of 16 bytes

MAX_SLOTS = 400
"""Largest cache, hubs included: the backward keeps 536 bytes per slot in 227 KiB of shared memory."""


class Shape(NamedTuple):
    """How a kernel wants to walk: windows of a step (one warp each), and slots for vertices beside those of the hubs.

    Few rows are read twice with so many slots, and with 14 hubs two blocks fit on a multiprocessor of 228 KiB (heads
    of up to 64). More are taken where the lists of two steps in a row need them.
    """

    windows: int
    slots: int


FORWARD = Shape(7, 302)
BACKWARD = Shape(4, 184)

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


def build_plan(schedule: Schedule, t_schedule: Schedule, num_hubs: int, shape: Shape = FORWARD) -> Plan | None:
    """The plan of a topology, or None where a window needs more rows than the cache can hold.

    Args:
        schedule, t_schedule: of the rows and of the transposed pattern, with the same windows; the same object where
            the pattern is symmetric.
        num_hubs: 0 to 64.
        shape: of the kernel that is to follow the plan.
    """
    windows = _windows(schedule, num_hubs)
    keys, bits = _keys(schedule, num_hubs)
    t_keys, t_bits = (keys, bits) if t_schedule is schedule else _keys(t_schedule, num_hubs)
    needs = [
        set(rows[rows >= 0].tolist()) | set(own.tolist()) | set(other.tolist())
        for rows, own, other in zip(windows, keys, t_keys, strict=True)
    ]
    limit = MAX_SLOTS - num_hubs
    groups = _steps(needs, limit, shape)
    if groups is None:
        return None
    groups = groups or [(0, 0)]  # hubs alone still meet each other
    step_needs = [set().union(*(needs[w] for w in range(first, end))) for first, end in groups]
    pairs = [len(a | b) for a, b in itertools.pairwise(step_needs)]
    capacity = max(pairs + [len(need) for need in step_needs] + [min(shape.slots, limit)])
    cache = _Cache(step_needs, windows, capacity, num_hubs)
    step_of_window = np.repeat(np.arange(len(groups)), [end - first for first, end in groups])
    orders = _row_orders(windows, step_of_window, cache)
    windows = np.take_along_axis(windows, orders, axis=1)
    bits, t_bits = _permuted_bits(bits, orders), _permuted_bits(t_bits, orders)
    hub_lists = [_hub_keys(windows[first:end], s, num_hubs, cache) for s, (first, end) in enumerate(groups)]
    extras, lists, masks = _chunk_tensors(keys, bits, step_of_window, cache, num_hubs, windows)
    if t_schedule is schedule:
        t_extras, t_lists, t_masks = extras, lists, masks
    else:
        t_extras, t_lists, t_masks = _chunk_tensors(
            t_keys, t_bits, step_of_window, cache, num_hubs, windows
        )
    hub_chunks = [_list_chunks(slots, _in_order(len(slots))) for slots in hub_lists]
    first_hub_chunk = len(lists) + np.concatenate([[0], np.cumsum([len(c) for c in hub_chunks])]).astype(np.int64)
    steps = np.zeros((len(groups), 8), np.int64)
    steps[:, 0], steps[:, 1] = cache.load_ranges()
    steps[:, 2], steps[:, 3] = cache.restart_ranges()
    steps[:, 4:6] = np.array(groups).reshape(-1, 2)
    steps[:, 6] = first_hub_chunk[:-1]
    steps[:, 7] = [len(slots) for slots in hub_lists]
    mask_words, t_mask_words = torch.from_numpy(masks), torch.from_numpy(t_masks)
    return Plan(
        steps=_int32(steps),
        loads=_int32(np.array(cache.loads).reshape(-1, 2)),
        restarts=_int32(np.array(cache.restarts).reshape(-1, 4)),
        rows=_int32(windows),
        row_slots=_int32(_row_slots(windows, step_of_window, cache)),
        extras=_int32(extras),
        lists=_int16(np.concatenate([lists, *hub_chunks])),
        masks=mask_words,
        t_extras=_int32(t_extras),
        t_lists=_int16(t_lists),
        t_masks=mask_words if t_schedule is schedule else t_mask_words,
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


def _keys(schedule: Schedule, num_hubs: int) -> tuple[list[_Array], list[_Array]]:
    """Per window the vertex tokens that it lists and their row bits, without padding."""
    offsets = schedule.key_offsets.cpu().numpy()
    vertices = schedule.keys.cpu().numpy().astype(np.int64)
    row_bits = schedule.row_masks.cpu().numpy().astype(np.int64)
    tokens, bits = [], []
    for begin, end in itertools.pairwise(offsets):
        valid = vertices[begin:end] >= 0
        tokens.append(vertices[begin:end][valid] + num_hubs)
        bits.append(row_bits[begin:end][valid])
    return tokens, bits


def _steps(needs: list[set[int]], limit: int, shape: Shape) -> list[tuple[int, int]] | None:
    """Consecutive windows, as many as the shape allows while two neighbouring steps fit into the cache together."""
    if any(len(need) > limit // 2 for need in needs):
        return None
    preferred = min(shape.slots, limit)
    groups: list[tuple[int, int]] = []
    begin, held, before = 0, set[int](), set[int]()
    for window, need in enumerate(needs):
        together = len(held | need)
        full = window - begin == shape.windows or 2 * together > limit or len(before | held | need) > preferred
        if window > begin and full:
            groups.append((begin, window))
            begin, held, before = window, set(), held
        held = held | need
    if needs:
        groups.append((begin, len(needs)))
    return groups


class _Cache:
    """Simulates the cache over all steps and records what it does.

    Attributes:
        loads: (token, slot) of all steps, one step after the other.
        restarts: (token, slot, step that needs it first, 0) that a block beginning at a step must load.
    """

    def __init__(self, needs: list[set[int]], windows: _Array, capacity: int, num_hubs: int) -> None:
        self._needs, self._hubs = needs, num_hubs
        rows = [window[window >= 0].tolist() for window in windows]
        self._mates = {token: window for window in rows for token in window}  # the window that a token is a row of
        self._uses: dict[int, list[int]] = {}
        for step, need in enumerate(needs):
            for token in need:
                self._uses.setdefault(token, []).append(step)
        self._passed = dict.fromkeys(self._uses, 0)  # how many uses lie before the current step
        self._slot_at: list[dict[int, int]] = []  # per step: where each needed token lies
        self._resident: dict[int, int] = {}
        self._free = [num_hubs + slot for slot in range(capacity)]
        self.loads: list[tuple[int, int]] = []
        self.restarts: list[tuple[int, int, int, int]] = []
        self._load_ends: list[int] = []
        self._restart_ends: list[int] = []
        for step in range(len(needs)):
            self._enter(step, capacity)

    def _next_use(self, token: int, step: int) -> int:
        uses, passed = self._uses[token], self._passed[token]
        while passed < len(uses) and uses[passed] < step:
            passed += 1
        self._passed[token] = passed
        return uses[passed] if passed < len(uses) else len(self._needs)

    def _enter(self, step: int, capacity: int) -> None:
        """Load what step needs, while the step before it is computed."""
        need = self._needs[step]
        new = sorted(need - self._resident.keys())
        before = self._needs[step - 1] if step else set()
        surplus = len(self._resident) + len(new) - capacity
        if surplus > 0:
            idle = self._resident.keys() - need - before
            for token in sorted(idle, key=lambda t: (-self._next_use(t, step), t))[:surplus]:
                self._free.append(self._resident.pop(token))
        self._place(new, need)
        self.loads += [(token, self._resident[token]) for token in new]
        self._load_ends.append(len(self.loads))
        self._slot_at.append({token: self._resident[token] for token in need})
        hubs = [(hub, hub, step, 0) for hub in range(self._hubs)]
        live = ((token, slot, self._next_use(token, step), 0) for token, slot in self._resident.items())
        kept = sorted((entry for entry in live if entry[2] < len(self._needs)), key=lambda entry: (entry[2], entry[1]))
        self.restarts += hubs + kept
        self._restart_ends.append(len(self.restarts))

    def _place(self, new: list[int], need: set[int]) -> None:
        """Slots for new tokens, spread evenly over the eight 16-byte columns of shared memory that rows start in.

        The rows of one window come first, since they are read together, then all that the step needs.
        """
        places = [self._resident[token] for token in need if token in self._resident]
        used = np.bincount(np.array(places, np.int64) % _BANK_COLUMNS, minlength=_BANK_COLUMNS)
        for token in new:
            mates = [self._resident[m] % _BANK_COLUMNS for m in self._mates[token] if m in self._resident]
            own = np.bincount(np.array(mates, np.int64), minlength=_BANK_COLUMNS)
            slot = min(self._free, key=lambda s: (own[s % _BANK_COLUMNS], used[s % _BANK_COLUMNS], s))
            self._free.remove(slot)
            self._resident[token] = slot
            used[slot % _BANK_COLUMNS] += 1

    def slots(self, step: int, tokens: _Array) -> _Array:
        """Where vertex tokens lie during a step that needs them."""
        return np.array([self._slot_at[step][token] for token in tokens.tolist()], np.int64)

    def load_ranges(self) -> tuple[list[int], list[int]]:
        """Begin and end of the loads of every step."""
        return [0, *self._load_ends[:-1]] if self._load_ends else [], self._load_ends

    def restart_ranges(self) -> tuple[list[int], list[int]]:
        """Begin and end of the restart list of every step."""
        return [0, *self._restart_ends[:-1]] if self._restart_ends else [], self._restart_ends


def _hub_keys(windows: _Array, step: int, num_hubs: int, cache: _Cache) -> _Array:
    """Slots of the keys that the hubs meet in this step: its own rows, and in the first one the hubs themselves."""
    if num_hubs == 0:
        return np.zeros(0, np.int64)
    own = cache.slots(step, windows[windows >= 0])
    return np.concatenate([np.arange(num_hubs), own]) if step == 0 else own


def _spread(slots: _Array, multiple: int) -> _Array:
    """int64, a multiple long: which of the slots stands at each place, -1 where none does.

    Eight in a row are read together, one 16-byte column of shared memory each: slots that fall into the same column
    go to different groups of eight, the most frequent columns and the emptiest groups first.
    """
    groups = -(-len(slots) // multiple) * (multiple // _BANK_COLUMNS)
    places = np.full((groups, _BANK_COLUMNS), -1, np.int64)
    filled = np.zeros(groups, np.int64)
    columns = slots % _BANK_COLUMNS
    for column in np.argsort(-np.bincount(columns, minlength=_BANK_COLUMNS), kind="stable"):
        members = np.flatnonzero(columns == column)
        while len(members):
            targets = np.argsort(filled, kind="stable")[: len(members)]
            targets = targets[filled[targets] < _BANK_COLUMNS]
            places[targets, filled[targets]] = members[: len(targets)]
            filled[targets] += 1
            members = members[len(targets) :]
    return places.ravel()


def _in_order(count: int) -> _Array:
    """The places of keys that keep their order, so that a count tells which of them are there."""
    places = np.full(-(-count // CHUNK_KEYS) * CHUNK_KEYS, -1, np.int64)
    places[:count] = np.arange(count)
    return places


def _list_chunks(slots: _Array, places: _Array) -> _Array:
    """int64 [chunks, 16, 4]: the slots in the order in which the lanes of a warp read them.

    An empty place repeats a slot of its group of eight, which costs no extra read, or any slot of the list.
    """
    padded = np.where(places >= 0, slots[places], -1).reshape(-1, _BANK_COLUMNS)
    first = np.where(padded[:, :1] >= 0, padded[:, :1], slots[0] if len(slots) else 0)
    padded = np.where(padded >= 0, padded, first)
    return padded.reshape(-1, CHUNK_KEYS // 16, 16).transpose(0, 2, 1)


def _chunk_tensors(
    keys: list[_Array], bits: list[_Array], step_of_window: _Array, cache: _Cache, num_hubs: int, windows: _Array
) -> tuple[_Array, _Array, _Array]:
    """Offsets of further chunks [W + 1], lists [C, 16, 4] and masks [C, 16] of all windows; lists begin with the hubs.

    A window with no key at all gets a chunk that no row may use.
    """
    every_row = np.full(num_hubs, (1 << WINDOW_ROWS) - 1, np.uint64)
    row_shifts = np.arange(WINDOW_ROWS, dtype=np.uint64)[None, :, None]
    lists: tuple[list[_Array], list[_Array]] = ([np.zeros((0, 16, 4), np.int64)], [np.zeros((0, 16, 4), np.int64)])
    masks: tuple[list[_Array], list[_Array]] = ([np.zeros((0, 16), np.int64)], [np.zeros((0, 16), np.int64)])
    extras = [0]
    for window, (tokens, row_bits) in enumerate(zip(keys, bits, strict=True)):
        step = int(step_of_window[window])
        slots = np.concatenate([np.arange(num_hubs), cache.slots(step, tokens)])
        seen = np.concatenate([every_row, row_bits.astype(np.uint64)])
        if len(slots) == 0:
            slots, seen = cache.slots(step, windows[window].max(keepdims=True)), np.zeros(1, np.uint64)
        places = _spread(slots, CHUNK_KEYS)
        columns = np.where(places >= 0, seen[places], 0).astype(np.uint64).reshape(-1, 1, CHUNK_KEYS)
        one_bit = (columns >> row_shifts) & np.uint64(1)
        words = (one_bit << np.arange(CHUNK_KEYS, dtype=np.uint64)).sum(axis=-1, dtype=np.uint64).view(np.int64)
        chunks = _list_chunks(slots, places)
        for target, array in ((lists, chunks), (masks, words)):
            target[0].append(array[:1])
            target[1].append(array[1:])
        extras.append(extras[-1] + len(chunks) - 1)
    return np.array(extras), np.concatenate(lists[0] + lists[1]), np.concatenate(masks[0] + masks[1])


def _row_orders(windows: _Array, step_of_window: _Array, cache: _Cache) -> _Array:
    """int64 [W, 16]: which row of the schedule's window stands at each place, so that eight can be read at once."""
    orders = np.zeros_like(windows)
    for window, rows in enumerate(windows):
        present = np.flatnonzero(rows >= 0)
        places = _spread(cache.slots(int(step_of_window[window]), rows[present]), WINDOW_ROWS)
        orders[window] = np.where(places >= 0, present[places], -1)
        orders[window][places < 0] = np.flatnonzero(rows < 0)
    return orders


def _permuted_bits(bits: list[_Array], orders: _Array) -> list[_Array]:
    """Row bits of the listed keys for windows whose rows stand in another order."""
    shifts = np.arange(WINDOW_ROWS)
    return [
        (((one[:, None] >> order[None, :]) & 1) << shifts).sum(axis=1) for one, order in zip(bits, orders, strict=True)
    ]


def _row_slots(windows: _Array, step_of_window: _Array, cache: _Cache) -> _Array:
    """int64 [W, 16]: slots of the windows' rows; where there is no row, that of another one."""
    slots = np.zeros_like(windows)
    for window, rows in enumerate(windows):
        step = int(step_of_window[window])
        slots[window] = cache.slots(step, np.where(rows >= 0, rows, rows.max()))
    return slots
