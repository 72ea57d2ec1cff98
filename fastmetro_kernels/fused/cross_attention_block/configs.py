"""Tile configurations of the cross-attention block: which there are, and which a shape gets. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

MAX_FEATURES = 128
"""A program holds whole rows of the output."""


class BlockConfig(NamedTuple):
    """Tile of one program: queries (16, 32 or 64), warps (1 to 8), and stages: heads that are loaded ahead (1 to 4)."""

    rows: int
    warps: int
    stages: int


_ACCEPTED = {"rows": (16, 32, 64), "warps": (1, 2, 4, 8), "stages": (1, 2, 3, 4)}

TILES: dict[int, tuple[BlockConfig, ...]] = {
    2: (
        BlockConfig(64, 4, 3),
        BlockConfig(64, 8, 3),
        BlockConfig(32, 4, 3),
        BlockConfig(32, 4, 2),
        BlockConfig(16, 4, 3),
        BlockConfig(16, 8, 3),
        BlockConfig(16, 2, 4),
    ),
    4: (BlockConfig(32, 8, 2), BlockConfig(16, 8, 2)),
}
"""By bytes per element, from large to small, of equal ones the likelier first. The benchmark times them all with
`--all-configs`."""

_FILLED = 200
"""Programs that keep a large GPU of about 130 multiprocessors busy."""


def pinned(batch: int, queries: int, element_size: int) -> BlockConfig:
    """The largest tile that makes enough programs, else the smallest."""
    tiles = TILES[element_size]

    def programs(tile: BlockConfig) -> int:
        return batch * -(-queries // tile.rows)

    smallest = next(tile for tile in tiles if tile.rows == tiles[-1].rows)
    return next((tile for tile in tiles if programs(tile) >= _FILLED), smallest)


def problem(config: BlockConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    return None
