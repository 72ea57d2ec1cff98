"""How the windows and channels of a max pool are shared out among programs. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

BYTES = 128
"""Of a position's channels that a program takes: eight lanes with 16 bytes each."""
LANES = 8


class MaxPoolConfig(NamedTuple):
    """Tile of one program: windows below one another (1, 2 or 4), each next to as many as warps (1 to 16) have lanes.

    More windows below one another read fewer rows twice, and leave fewer programs.
    """

    rows: int
    warps: int


CONFIGS = tuple(MaxPoolConfig(rows, warps) for rows in (1, 2, 4) for warps in (2, 4, 8))
"""What `python -m bench max_pool --all-configs` times."""
PINNED = MaxPoolConfig(2, 4)
"""So 32 images of 64 x 112 x 112 are 3,136 programs, of which a multiprocessor has six or seven at a time."""
_ACCEPTED = {"rows": (1, 2, 4), "warps": (1, 2, 4, 8, 16)}


class Plan(NamedTuple):
    """Channels and strips of a program; all strips (columns of a few windows), blocks of channels, tiles of strips."""

    channels: int
    positions: int
    strips: int
    blocks: int
    tiles: int


def plan(batch: int, height: int, width: int, channels: int, itemsize: int, config: MaxPoolConfig) -> Plan:
    """For windows [batch, height, width] of so many channels. A strip has ``config.rows`` windows."""
    each = BYTES // itemsize
    positions = 32 // LANES * config.warps
    strips = batch * -(-height // config.rows) * width
    return Plan(each, positions, strips, -(-channels // each), -(-strips // positions))


def problem(config: MaxPoolConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, accepted in _ACCEPTED.items():
        if (value := getattr(config, name)) not in accepted:
            return f"{name} must be one of {', '.join(map(str, accepted))}, got {value}"
    return None
