"""Windows as the CUDA kernels for few rows read them (`csrc/attention/few.cuh`): in pairs, each with all that it needs.

Where a batch is small, little is gained by sharing rows between many windows, and a plan to follow is one more thing to
wait for. So a pair of windows names the tokens that it reads, and where in this list the keys of each window are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmetro_kernels.schedule import WINDOW_ROWS, Schedule

LISTED_KEYS = 64
"""Keys of a window, hubs included."""

BLOCK_WINDOWS, BLOCK_TOKENS = 2, 128
MOST_WINDOWS = 1024
"""Of a mesh: more would not find room on any device at once, and these kernels are for meshes that do."""

_WINDOW_BYTES = 2 * LISTED_KEYS + 8 * WINDOW_ROWS + 4 * WINDOW_ROWS + WINDOW_ROWS
BLOCK_BYTES = BLOCK_WINDOWS * _WINDOW_BYTES + 4 * BLOCK_TOKENS + 16


def build_few(schedule: Schedule, num_hubs: int) -> Tensor | None:
    """uint8 [ceil(W / 2), 1200] on the CPU, or None where a window has more than 64 keys or a pair too many tokens.

    A pair consists of: two chunks (`packing.py`) of 64 keys, hubs first; of each window 16 int32, the tokens of the
    rows, -1 where there is none; of each 16 bytes, the slots of the rows; 128 int32, the tokens of slots 0, 1, ...; how
    many of them there are, and three numbers without a meaning. Tokens are numbered hubs first.

    Args:
        schedule: of windows of 16 rows.
        num_hubs: 0 to 64.
    """
    vertices = schedule.row_order.cpu().numpy().reshape(-1, WINDOW_ROWS).astype(np.int32)
    if len(vertices) > MOST_WINDOWS:
        return None
    rows = np.where(vertices >= 0, vertices + num_hubs, -1).astype(np.int32)
    offsets, keys = schedule.key_offsets.cpu().numpy(), schedule.keys.cpu().numpy()
    masks = schedule.row_masks.cpu().numpy().astype(np.int64)
    windows = []
    for window in range(len(rows)):
        part = slice(offsets[window], offsets[window + 1])
        listed = keys[part] >= 0
        windows.append((rows[window], keys[part][listed] + num_hubs, masks[part][listed]))
    blocks = []
    for first in range(0, len(windows), BLOCK_WINDOWS):
        block = _block(windows[first : first + BLOCK_WINDOWS], num_hubs)
        if block is None:
            return None
        blocks.append(block)
    return torch.from_numpy(np.stack(blocks) if blocks else np.zeros((0, BLOCK_BYTES), np.uint8))


_Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens of its rows [16], of its keys without the hubs [K], and which rows see these [K], bit by bit."""


def _block(windows: list[_Window], num_hubs: int) -> np.ndarray | None:
    tokens = list(range(num_hubs))
    for rows, keys, _ in windows:
        tokens += keys.tolist() + rows[rows >= 0].tolist()
    slots = {token: slot for slot, token in enumerate(dict.fromkeys(tokens))}
    most_keys = max(len(keys) for _, keys, _ in windows)
    if len(slots) > BLOCK_TOKENS or num_hubs + most_keys > LISTED_KEYS:
        return None
    chunks = np.zeros((BLOCK_WINDOWS, 256), np.uint8)
    row_tokens = np.full((BLOCK_WINDOWS, WINDOW_ROWS), -1, np.int32)
    row_slots = np.zeros((BLOCK_WINDOWS, WINDOW_ROWS), np.uint8)
    for number, (rows, keys, masks) in enumerate(windows):
        key_slots = np.zeros(LISTED_KEYS, np.int16)
        seen = np.zeros((LISTED_KEYS, WINDOW_ROWS), np.uint8)
        key_slots[:num_hubs], seen[:num_hubs] = np.arange(num_hubs), 1
        key_slots[num_hubs : num_hubs + len(keys)] = [slots[key] for key in keys.tolist()]
        seen[num_hubs : num_hubs + len(keys)] = masks[:, None] >> np.arange(WINDOW_ROWS) & 1
        chunks[number, : 2 * LISTED_KEYS] = np.ascontiguousarray(key_slots.reshape(-1, 16).T).view(np.uint8).ravel()
        chunks[number, 2 * LISTED_KEYS :] = np.packbits(seen.T, axis=1, bitorder="little").ravel()
        row_tokens[number] = rows
        row_slots[number] = [slots.get(row, 0) for row in rows.tolist()]
    listed = np.zeros(BLOCK_TOKENS + 4, np.int32)
    listed[: len(slots)] = list(slots)
    listed[BLOCK_TOKENS] = len(slots)
    return np.concatenate([part.view(np.uint8).ravel() for part in (chunks, row_tokens, row_slots, listed)])
