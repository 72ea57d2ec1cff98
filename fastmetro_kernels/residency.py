"""The cache of rows of the CUDA attention kernels: which row lies in which slot at which step (see `plan.py`)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastmetro_kernels.adjacency import sorted_unique

BANK_COLUMNS = 8  # shared memory is read 128 bytes at a time: eight pieces of 16 bytes

_NO_SLOT = 1 << 60  # closes the heap of free slots of a column: no slot is worse
_Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Uses:
    """Which tokens every step needs.

    Attributes:
        keys: int64 [U], step * tokens + token, ascending without duplicates.
        tokens: more than the largest token.
        steps: their number S.
    """

    keys: _Array
    tokens: int
    steps: int

    @classmethod
    def of(cls, steps_of_entries: _Array, tokens_of_entries: _Array, steps: int) -> Uses:
        """From entries in any order, also repeated ones."""
        tokens = int(tokens_of_entries.max(initial=-1)) + 1
        return cls(sorted_unique(steps_of_entries * tokens + tokens_of_entries), max(tokens, 1), steps)

    def offsets(self) -> _Array:
        """int64 [S + 1]: the uses of step s are `offsets[s]` to `offsets[s + 1]` - 1."""
        return np.searchsorted(self.keys, np.arange(self.steps + 1) * self.tokens)

    def following(self) -> _Array:
        """int64 [U]: the next step that needs the token of a use, S where none does."""
        step, token = self.keys // self.tokens, self.keys % self.tokens
        order = np.argsort(token, kind="stable")
        result = np.full(len(order), self.steps)
        same = token[order[1:]] == token[order[:-1]]
        result[order[:-1][same]] = step[order[1:][same]]
        return result

    def most_at_once(self) -> int:
        """Most tokens of two consecutive steps."""
        sizes = np.diff(self.offsets())
        step = self.keys // self.tokens
        shared = np.bincount(step[self.following() == step + 1], minlength=self.steps)
        return max(int((sizes[:-1] + sizes[1:] - shared[:-1]).max(initial=0)), int(sizes.max(initial=0)))


class Residency:
    """Simulates the cache over all steps and records what it does.

    Attributes:
        loads: int64 [N, 2], (token, slot) of all steps, one step after the other.
        load_ends: int64 [S], the end of every step's loads.
        restarts: int64 [M, 4], (token, slot, step that needs it first, 0) that a block beginning at a step must load.
        restart_ends: int64 [S], the end of every step's restarts.
    """

    def __init__(self, uses: Uses, windows: _Array, capacity: int, num_hubs: int) -> None:
        """Slots `num_hubs` to `num_hubs + capacity - 1` are filled with what `uses` needs; hubs have the first ones.

        `windows` [W, 16] holds the tokens of the windows, -1 where there is none; the rows of a window are read
        together.
        """
        self._uses, self._hubs, self._capacity = uses, num_hubs, capacity
        slots = num_hubs + capacity
        self._token = np.full(slots, -1)  # of every slot: its token,
        self._last = np.full(slots, -2)  # the last step that needed it,
        self._next = np.full(slots, uses.steps)  # and the next one
        self._slot = np.full(uses.tokens, -1)
        window_of = np.zeros(uses.tokens, np.int64)
        window_of[windows[windows >= 0]] = np.nonzero(windows >= 0)[0]
        self._window = window_of.tolist()
        self._beside = [[0] * BANK_COLUMNS for _ in range(len(windows))]  # rows of a window in each column
        self._free = [[s for s in range(num_hubs, slots) if s % BANK_COLUMNS == c] for c in range(BANK_COLUMNS)]
        for heap in self._free:
            heap.append(_NO_SLOT)
        self._run()

    def _run(self) -> None:
        offsets, following = self._uses.offsets().tolist(), self._uses.following()
        tokens = self._uses.keys % self._uses.tokens
        self._slots = np.empty(len(tokens), np.int64)
        hubs = np.repeat(np.arange(self._hubs)[:, None], 4, axis=1)
        hubs[:, 3] = 0
        loads, restarts = [np.zeros((0, 2), np.int64)], [np.zeros((0, 4), np.int64)]
        for step in range(self._uses.steps):
            own = slice(offsets[step], offsets[step + 1])
            need = tokens[own]
            new = need[self._slot[need] < 0]
            self._enter(step, need, new)
            slots = self._slot[need]
            self._slots[own] = slots
            loads.append(np.stack([new, self._slot[new]], axis=1))
            hubs[:, 2] = step
            restarts += [hubs.copy(), self._live()]
            self._last[slots], self._next[slots] = step, following[own]
        self.loads, self.load_ends = np.concatenate(loads), np.cumsum([len(part) for part in loads[1:]], dtype=np.int64)
        self.restarts = np.concatenate(restarts)
        self.restart_ends = np.cumsum([len(part) for part in restarts[1:]], dtype=np.int64)[1::2]

    def _enter(self, step: int, need: _Array, new: _Array) -> None:
        """Load `new`, what `step` needs and the cache lacks, while the step before is computed."""
        surplus = int((self._token >= 0).sum()) + len(new) - self._capacity
        if surplus > 0:
            # Neither this step nor the one before needs them; the latest next use goes first.
            idle = np.flatnonzero((self._token >= 0) & (self._last < step - 1) & (self._next > step))
            for slot in idle[np.lexsort((self._token[idle], -self._next[idle]))[:surplus]].tolist():
                token = int(self._token[slot])
                self._token[slot] = self._slot[token] = -1
                self._beside[self._window[token]][slot % BANK_COLUMNS] -= 1
                heapq.heappush(self._free[slot % BANK_COLUMNS], slot)
        held = self._slot[need]
        slots = self._place(new.tolist(), np.bincount(held[held >= 0] % BANK_COLUMNS, minlength=BANK_COLUMNS).tolist())
        self._slot[new], self._token[slots], self._next[slots] = slots, new, step

    def _place(self, new: list[int], used: list[int]) -> list[int]:
        """Slots for new tokens, spread evenly over the eight 16-byte columns of shared memory that rows start in.

        The rows of one window come first, since they are read together, then all that the step needs (`used` counts
        them by column), then the number of the slot: one integer compares all three.
        """
        slots = []
        for token in new:
            beside = self._beside[self._window[token]]
            costs = [(b << 40) + (u << 20) + h[0] for b, u, h in zip(beside, used, self._free, strict=True)]
            column = costs.index(min(costs))
            slots.append(heapq.heappop(self._free[column]))
            beside[column] += 1
            used[column] += 1
        return slots

    def _live(self) -> _Array:
        """int64 [*, 4]: restart entries of what the cache holds and somebody needs now or later."""
        live = np.flatnonzero((self._token >= 0) & (self._next < self._uses.steps))
        live = live[np.argsort(self._next[live], kind="stable")]
        return np.stack([self._token[live], live, self._next[live], np.zeros_like(live)], axis=1)

    def slots(self, steps: _Array, tokens: _Array) -> _Array:
        """Where vertex tokens lie during steps that need them; arrays of one shape."""
        return self._slots[np.searchsorted(self._uses.keys, steps * self._uses.tokens + tokens)]
