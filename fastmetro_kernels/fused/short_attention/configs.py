"""Tile configurations of attention over few keys: which there are, and which one a shape gets. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

MAX_KEYS = 128
"""The keys of a head that fit one tile."""

MAX_DIM = 128


class ShortAttentionConfig(NamedTuple):
    """Tile of one program: queries of one head (16, 32, 64 or 128), and warps (1 to 8)."""

    rows: int
    warps: int


_ACCEPTED = {"rows": (16, 32, 64, 128), "warps": (1, 2, 4, 8)}

TILES: dict[int, tuple[ShortAttentionConfig, ...]] = {
    2: (
        ShortAttentionConfig(64, 4),
        ShortAttentionConfig(128, 8),
        ShortAttentionConfig(128, 4),
        ShortAttentionConfig(32, 2),
        ShortAttentionConfig(32, 4),
        ShortAttentionConfig(16, 2),
        ShortAttentionConfig(16, 1),
        ShortAttentionConfig(16, 4),
    ),
    # Float32 products do not run on tensor cores but from registers: other tiles spill.
    4: (ShortAttentionConfig(32, 8), ShortAttentionConfig(16, 8)),
}
"""By bytes per element, from large to small, of equal ones the likelier first. The benchmark times them all with
`--all-configs`."""

_FILLED = 200
"""Programs that keep a large GPU of about 130 multiprocessors busy: these are short, and several fit each."""


_MANY = 4_000
"""Programs from which tiles of 128 queries and 4 warps are the fastest: 107 microseconds instead of 111 for 256 images
of 445 queries and 64 features (``bench/results/fused_h200.csv``), at 32 images not."""


def pinned(batch_heads: int, queries: int, element_size: int) -> ShortAttentionConfig:
    """The largest tile that makes enough programs, else the smallest: each tile reads all keys, but from L2."""
    tiles = TILES[element_size]

    def programs(tile: ShortAttentionConfig) -> int:
        return batch_heads * -(-queries // tile.rows)

    if (large := ShortAttentionConfig(128, 4)) in tiles and programs(large) >= _MANY:
        return large
    smallest = next(tile for tile in tiles if tile.rows == tiles[-1].rows)
    return next((tile for tile in tiles if programs(tile) >= _FILLED), smallest)


def problem(config: ShortAttentionConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    return None
