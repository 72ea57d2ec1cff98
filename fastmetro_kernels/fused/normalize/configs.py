"""Tiles of the row norm: which there are, and which one a shape gets. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple


class NormalizeConfig(NamedTuple):
    """Tile of one program: whole rows (a power of two up to 64), and warps (1 to 16)."""

    rows: int
    warps: int


_ACCEPTED = {"rows": (1, 2, 4, 8, 16, 32, 64), "warps": (1, 2, 4, 8, 16)}

ELEMENTS = (1024, 4096, 8192)
"""Numbers per program; the benchmark times tiles of all these sizes with `--all-configs`."""

_FILLED = 264
"""Programs that keep a large GPU of about 130 multiprocessors busy: two each."""


def tiles(width: int) -> tuple[NormalizeConfig, ...]:
    """The tiles that rows of this width can have, from large to small: 16 numbers per lane, 8 in the smallest."""
    padded = 1 << max(width - 1, 0).bit_length()
    found = []
    for elements in reversed(ELEMENTS):
        rows = min(max(elements // padded, 1), 64)
        lanes = rows * padded // (8 if elements == ELEMENTS[0] else 16)
        found.append(NormalizeConfig(rows, min(max(1 << max(lanes // 32, 1).bit_length() - 1, 1), 16)))
    return tuple(dict.fromkeys(found))


def pinned(rows: int, width: int) -> NormalizeConfig:
    """The largest tile of up to 4,096 numbers that makes enough programs, else the smallest."""
    candidates = [tile for tile in tiles(width) if tile.rows * width <= ELEMENTS[1]] or [tiles(width)[-1]]
    return next((tile for tile in candidates if -(-rows // tile.rows) >= _FILLED), candidates[-1])


def problem(config: NormalizeConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    return None
