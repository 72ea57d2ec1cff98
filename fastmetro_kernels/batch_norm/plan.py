"""How the rows and channels of a batch norm are shared out among programs. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

CHANNELS = 64
"""Of a program: 128 bytes of each row in half precision."""


class BatchNormConfig(NamedTuple):
    """Tile of one program: rows at a time (a power of two from 16 to 256), warps (1 to 32), and programs of a launch.

    Programs: one for each multiprocessor of a large GPU, or a multiple. The same number everywhere, so that sums are
    taken in the same order on every device.
    """

    rows: int
    warps: int
    programs: int = 132


_LARGE = BatchNormConfig(32, 8, 264)
_SMALL, _SMALL_BACKWARD = BatchNormConfig(16, 4), BatchNormConfig(16, 4, 264)
"""16 bytes per lane in half precision; the kernels have two to eight such tiles under way."""
CONFIGS = (
    _LARGE, _SMALL, _SMALL_BACKWARD, BatchNormConfig(64, 16), BatchNormConfig(64, 16, 264), BatchNormConfig(32, 8),
    BatchNormConfig(16, 4, 528),
)  # fmt: skip
"""What `python -m bench batch_norm --all-configs` times."""
_ACCEPTED = {"rows": (16, 32, 64, 128, 256), "warps": (1, 2, 4, 8, 16, 32)}


class Plan(NamedTuple):
    """Blocks of channels, groups of rows (both: of programs), rows of a group, rows of a tile, and warps."""

    blocks: int
    groups: int
    rows_each: int
    rows: int
    warps: int


_FEW_NUMBERS = 2**22
"""Up to so many, of which a large GPU's second-level cache has several times as many, the small tile is faster."""


def pinned(rows: int, channels: int, backward: bool = False) -> BatchNormConfig:
    """The large tile, where there is enough for all programs; else the small one, of that pass."""
    blocks = -(-channels // CHANNELS)
    enough = rows * channels > _FEW_NUMBERS and blocks * -(-rows // (4 * _LARGE.rows)) >= _LARGE.programs
    return _LARGE if enough else _SMALL_BACKWARD if backward else _SMALL


def plan(rows: int, channels: int, config: BatchNormConfig | None = None, backward: bool = False) -> Plan:
    """For so many rows and channels, with a tile other than the pinned one if given."""
    tile = config or pinned(rows, channels, backward)
    blocks = -(-channels // CHANNELS)
    tiles = -(-rows // tile.rows)
    each = -(-tiles // max(min(tile.programs // blocks, tiles), 1))
    return Plan(blocks, -(-tiles // each), each * tile.rows, tile.rows, tile.warps)


def problem(config: BatchNormConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, accepted in _ACCEPTED.items():
        if (value := getattr(config, name)) not in accepted:
            return f"{name} must be one of {', '.join(map(str, accepted))}, got {value}"
    return None if config.programs >= 1 else f"programs must be at least 1, got {config.programs}"
