"""Tiles of the pixels' kernel: which there are, and which one a number of numbers gets. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple


class PixelsConfig(NamedTuple):
    """Tile of one program: three blocks of consecutive numbers (256, 1024 or 4096 each), and warps (1 to 16)."""

    block: int
    warps: int


_ACCEPTED = {"block": (256, 1024, 4096), "warps": (1, 2, 4, 8, 16)}

TILES = (
    PixelsConfig(4096, 16),
    PixelsConfig(1024, 8),
    PixelsConfig(1024, 4),
    PixelsConfig(256, 2),
    PixelsConfig(256, 1),
)
"""What the benchmark times with `--all-configs`. 8 numbers of a block per lane are one write of 16 bytes in half
precision; with 16 the compiler would send them through shared memory in between."""

_LARGE, _SMALL = PixelsConfig(1024, 4), PixelsConfig(256, 1)
_FILLED = 264
"""Programs that keep a large GPU of about 130 multiprocessors busy: two each."""


def pinned(numbers: int) -> PixelsConfig:
    """The large tile where it makes enough programs, else the small one: 196 programs for one image of 224 x 224."""
    return _LARGE if -(-numbers // (3 * _LARGE.block)) >= _FILLED else _SMALL


def problem(config: PixelsConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    return None
