"""The plan of `plan.py` as the CUDA kernels read it: what belongs to a window or to a tile of keys lies in one place.

A chunk is a tile of up to 64 keys: 128 bytes of slots (int16, key 16 i + j at [j, i]) and 128 bytes of masks (a 64-bit
word for each of the 16 rows). A record, one per window, is what a block copies to shared memory ahead of time:

    forward   chunk (256), tokens (16 int32), first and end of its extra chunks and how many groups of 16 keys the
              chunk has (3 int32), 4 bytes unused
    backward  the same, slots of the rows (16 int16), and where the pattern is not symmetric also the chunk of the
              transposed pattern (256), first and end of its extra chunks, groups (3 int32), 4 bytes unused

`csrc/attention/stream.cuh` names the same offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastmetro_kernels.plan import CHUNK_KEYS, Plan
from fastmetro_kernels.schedule import WINDOW_ROWS

_Bytes = npt.NDArray[np.uint8]


class PackedPlan(NamedTuple):
    """Tensors and sizes that the ops take.

    Attributes:
        steps: as in `Plan`, but the first hub chunk counts from 0.
        loads, restarts: as in `Plan`.
        records: uint8 [W, 336, 368 or 640].
        hub_chunks: uint8 [C, 256], the keys that the hubs meet, step by step.
        extra_chunks: uint8 [E, 256], of windows with more than 64 keys.
        slots: size of the cache in rows.
        windows: most windows of a step.
    """

    steps: Tensor
    loads: Tensor
    restarts: Tensor
    records: Tensor
    hub_chunks: Tensor
    extra_chunks: Tensor
    slots: int
    windows: int


def pack(plan: Plan, backward: bool) -> PackedPlan:
    """The plan for the forward, or for the backward kernel."""
    windows = len(plan.rows)
    chunks = _chunks(plan.lists, plan.masks)
    extra = [chunks[windows:]]
    parts = [chunks[:windows], _bytes(plan.rows), _extras(plan.extras, 0, plan.masks)]
    if backward:
        parts.append(_bytes(plan.row_slots.to(torch.int16)))
        if plan.t_masks is not plan.masks:
            transposed = _chunks(plan.t_lists, plan.t_masks)
            parts += [transposed[:windows], _extras(plan.t_extras, len(extra[0]), plan.t_masks)]
            extra.append(transposed[windows:])
    return PackedPlan(
        _steps(plan),
        plan.loads,
        plan.restarts,
        torch.from_numpy(np.concatenate(parts, axis=1)),
        torch.from_numpy(_hub_chunks(plan)),
        torch.from_numpy(np.concatenate(extra)),
        plan.slots,
        plan.windows,
    )


def _bytes(tensor: Tensor) -> _Bytes:
    """uint8 [n, bytes of a row] of a tensor [n, ...]."""
    array = np.ascontiguousarray(tensor.numpy())
    return array.view(np.uint8).reshape(len(array), array.itemsize * int(np.prod(array.shape[1:])))


def _chunks(lists: Tensor, masks: Tensor) -> _Bytes:
    """uint8 [C, 256]; the lists may be followed by those of the hubs, which have no masks."""
    if len(masks) == 0:
        return np.zeros((0, 4 * CHUNK_KEYS), np.uint8)
    return np.concatenate([_bytes(lists[: len(masks)]), _bytes(masks)], axis=1)


def _extras(extras: Tensor, base: int, masks: Tensor) -> _Bytes:
    """uint8 [W, 16]: first and end of each window's extra chunks in the array of all of them, groups of its chunk."""
    windows = len(extras) - 1
    seen = np.bitwise_or.reduce(masks[:windows].numpy().view(np.uint64), axis=1)
    group_ends = np.uint64(1) << np.arange(0, CHUNK_KEYS, 16, dtype=np.uint64)
    numbers = np.zeros((windows, 4), np.int32)
    numbers[:, 0] = base + extras.numpy()[:-1]
    numbers[:, 1] = base + extras.numpy()[1:]
    numbers[:, 2] = (seen[:, None] >= group_ends).sum(axis=1)
    return numbers.view(np.uint8)


def _steps(plan: Plan) -> Tensor:
    """int32 [S, 8]"""
    steps = plan.steps.clone()
    steps[:, 6] -= plan.steps[0, 6]
    return steps


def _hub_chunks(plan: Plan) -> _Bytes:
    """uint8 [C, 256]: every row sees the keys that there are, in the order of `steps`."""
    first, counts = plan.steps.numpy()[:, 6:].T
    lists = _bytes(plan.lists[int(first[0]) :])
    masks = np.zeros((len(lists), WINDOW_ROWS), np.uint64)
    for begin, count in zip(first - first[0], counts, strict=True):
        for chunk in range(-(-int(count) // CHUNK_KEYS)):
            keys = min(CHUNK_KEYS, int(count) - CHUNK_KEYS * chunk)
            masks[begin + chunk] = np.uint64((1 << keys) - 1)
    return np.concatenate([lists, _bytes(torch.from_numpy(masks.view(np.int64)))], axis=1)
