"""Windows as the CUDA kernel for few rows reads them (`csrc/attention/few.cuh`): each with all that it needs.

Where a batch is small, nothing is gained by sharing rows between windows, and a plan to follow is one more thing to
wait for. So a window names the tokens of its keys, not places in a cache.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmetro_kernels.schedule import WINDOW_ROWS, Schedule

LISTED_KEYS = 64
"""Keys of a window, hubs included."""

WINDOW_BYTES = 2 * LISTED_KEYS + 8 * WINDOW_ROWS + 4 * WINDOW_ROWS + 16 + 4 * LISTED_KEYS


def build_few(schedule: Schedule, num_hubs: int) -> Tensor | None:
    """uint8 [W, 592] on the CPU, or None where a window has more than 64 keys.

    A window is a chunk (`packing.py`) of 64 keys in slots 0 to 63, hubs first; 16 int32, the tokens of the rows, -1
    where there is none; 4 int32 of which the third is the number of groups of keys; 64 int32, the tokens of the keys,
    the first one again where there are fewer. Tokens are numbered hubs first.

    Args:
        schedule: of windows of 16 rows.
        num_hubs: 0 to 64.
    """
    room = LISTED_KEYS - num_hubs
    vertices = schedule.row_order.cpu().numpy().reshape(-1, WINDOW_ROWS).astype(np.int32)
    rows = np.where(vertices >= 0, vertices + num_hubs, -1).astype(np.int32)
    windows, hubs = len(rows), np.arange(num_hubs)
    listed = schedule.keys.cpu().numpy() >= 0
    window_of_key = np.repeat(np.arange(windows), np.diff(schedule.key_offsets.cpu().numpy()))[listed]
    counts = np.bincount(window_of_key, minlength=windows)
    if (counts > room).any():
        return None
    place = num_hubs + np.arange(len(window_of_key)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.full((windows, LISTED_KEYS), -1, np.int32)
    keys[:, :num_hubs] = hubs
    keys[window_of_key, place] = schedule.keys.cpu().numpy()[listed] + num_hubs
    first = np.where(keys[:, :1] >= 0, keys[:, :1], rows[:, :1])  # a window without keys names a row of its own
    keys = np.where(keys >= 0, keys, first)
    seen = np.zeros((windows, LISTED_KEYS, WINDOW_ROWS), np.uint8)
    seen[:, :num_hubs] = 1
    bits = schedule.row_masks.cpu().numpy()[listed].astype(np.int64)
    seen[window_of_key, place] = bits[:, None] >> np.arange(WINDOW_ROWS) & 1
    masks = np.packbits(seen.transpose(0, 2, 1), axis=2, bitorder="little")  # [W, 16, 8]
    slots = np.arange(LISTED_KEYS, dtype=np.int16).reshape(-1, 16).T
    slot_bytes = np.broadcast_to(np.ascontiguousarray(slots).view(np.uint8).ravel(), (windows, 2 * LISTED_KEYS))
    extras = np.broadcast_to(np.array([0, 0, LISTED_KEYS // 16, 0], np.int32).view(np.uint8), (windows, 16))
    mask_bytes = masks.reshape(windows, 8 * WINDOW_ROWS)
    parts = [slot_bytes, mask_bytes, rows.view(np.uint8), extras, keys.view(np.uint8)]
    return torch.from_numpy(np.concatenate(parts, axis=1))
