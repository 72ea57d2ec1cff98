"""Where the kernel for the end of a bottleneck block was measured to be faster than those whose place it takes."""

from __future__ import annotations

FOLLOWED, WIDENED, ALONE, JOINED = "followed", "widened", "alone", "joined"
FOLLOWING = {FOLLOWED: 64, WIDENED: 128, ALONE: 0, JOINED: 64}
"""Channels behind the block: with a residual and the next block's first convolution; with that of the next stage; with
a residual alone; with a second input's convolution and the next block's first."""
MODES = tuple(FOLLOWING)

MEASURED: dict[tuple[int, int, str], int] = {(56, 56, mode): 1 for mode in MODES}
"""(height, width, one of `MODES`) -> from how many images on the kernel is faster, on an H200, in float16. What is not
here is left to the others; `python -m bench convolution --batch 32 256 --only endings` prints the entries."""


def is_measured(images: int, height: int, width: int, mode: str) -> bool:
    """Whether the kernel was measured to be faster for so many images of this size."""
    fewest = MEASURED.get((height, width, mode))
    return fewest is not None and images >= fewest
