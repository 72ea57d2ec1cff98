"""How tensors are cut into the chunks that programs take. Nothing needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHIFT = 40
"""A chunk is one number: which tensor, shifted by this, and which of the tensor's chunks."""


class AdamWConfig(NamedTuple):
    """Numbers of a chunk and numbers at a time (both powers of two), and warps of a program."""

    chunk: int
    block: int
    warps: int


PINNED = AdamWConfig(4096, 512, 4)
"""Four numbers per lane, 16 bytes of each tensor in float32. With eight, stores go through shared memory first."""
CONFIGS = (
    PINNED,
    AdamWConfig(2048, 512, 4),
    AdamWConfig(8192, 512, 4),
    AdamWConfig(2048, 256, 2),
    AdamWConfig(4096, 1024, 8),
    AdamWConfig(8192, 1024, 8),
    AdamWConfig(16384, 1024, 8),
    AdamWConfig(4096, 1024, 4),
)
"""What `python -m bench adamw --all-configs` times."""


def problem(config: AdamWConfig) -> str | None:
    """Why a tile is not accepted, or None."""
    if config.warps not in (1, 2, 4, 8, 16):
        return f"warps must be one of 1, 2, 4, 8, 16, got {config.warps}"
    for name, value in (("chunk", config.chunk), ("block", config.block)):
        if not 64 <= value <= 65536 or value & (value - 1):
            return f"{name} must be a power of two from 64 to 65536, got {value}"
    if config.block > config.chunk:
        return f"block must be at most chunk, got {config.block} and {config.chunk}"
    return None


def chunks(sizes: Sequence[int], chunk: int) -> NDArray[np.int64]:
    """All chunks of tensors of so many numbers, int64 [chunks]: tensor by tensor, each from its beginning."""
    counts = -(-np.asarray(sizes, dtype=np.int64) // chunk)
    tensors = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    return (tensors << SHIFT) + np.arange(len(tensors), dtype=np.int64) - first[tensors]
