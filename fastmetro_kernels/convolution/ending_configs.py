"""Where the kernel for the end of a bottleneck block was measured to be faster than those whose place it takes."""

from __future__ import annotations

FOLLOWED, ALONE, JOINED = "followed", "alone", "joined"
MODES = (FOLLOWED, ALONE, JOINED)
"""With a residual and the convolution behind the block; with a residual; with a second input's convolution and the one
behind the block."""

MEASURED: dict[tuple[int, int, str], int] = {}
"""(height, width, one of `MODES`) -> from how many images on the kernel is faster, on an H200, in float16. What is not
here is left to the others; `python -m bench convolution --batch 32 256 --only endings` prints the entries."""


def is_measured(images: int, height: int, width: int, mode: str) -> bool:
    """Whether the kernel was measured to be faster for so many images of this size."""
    fewest = MEASURED.get((height, width, mode))
    return fewest is not None and images >= fewest
