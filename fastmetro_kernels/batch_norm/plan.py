"""How the rows and channels of a batch norm are shared out among programs. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

CHANNELS = 64
"""Of a program: 128 bytes of each row in half precision."""
PROGRAMS = 132
"""Of a launch, about: one for each multiprocessor of a large GPU. The same number everywhere, so that sums are taken in
the same order on every device."""
_TILES = ((256, 16), (128, 8), (64, 4), (32, 2))
"""Rows at a time and warps, 32 numbers per lane."""


class Plan(NamedTuple):
    """Blocks of channels, groups of rows (both: of programs), rows of a group, rows of a tile, and warps."""

    blocks: int
    groups: int
    rows_each: int
    rows: int
    warps: int


def plan(rows: int, channels: int) -> Plan:
    """The largest tile with which there are enough programs, else the smallest one."""
    blocks = -(-channels // CHANNELS)
    tile, warps = next((one for one in _TILES if blocks * -(-rows // one[0]) >= PROGRAMS), _TILES[-1])
    tiles = -(-rows // tile)
    each = -(-tiles // max(min(PROGRAMS // blocks, tiles), 1))
    return Plan(blocks, -(-tiles // each), each * tile, tile, warps)
