"""Tile configurations of the fused linear layer: which there are, and which one a shape gets. Nothing needs Triton.

Everything is a function of shapes, so that a call captured in a CUDA graph replays what it launched, and equal calls
give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple


class LinearConfig(NamedTuple):
    """Tile of one program.

    Attributes:
        rows: tokens of a tile, 16 to 256.
        columns: output features of a tile, 16 to 256.
        depth: input features of a step (of each share), 16 to 512.
        shares: parts of the depth of a step that different warps multiply at a time, 1 to 8. They shorten the chain of
            products that wait for each other, and what is multiplied in a step is depth * shares.
        warps: 1 to 16.
        stages: steps that are loaded ahead, 1 to 16.
    """

    rows: int
    columns: int
    depth: int
    shares: int
    warps: int
    stages: int


_ACCEPTED = {
    "rows": (16, 32, 64, 128, 256),
    "columns": (4, 16, 32, 64, 128, 256),
    "depth": (16, 32, 64, 128, 256, 512),
    "shares": (1, 2, 4, 8),
    "warps": (1, 2, 4, 8, 16),
    "stages": tuple(range(1, 17)),
}

TILES: dict[int, tuple[LinearConfig, ...]] = {
    2: (
        LinearConfig(128, 128, 64, 1, 8, 3),
        LinearConfig(128, 256, 64, 1, 8, 3),
        LinearConfig(128, 256, 64, 1, 8, 4),
        LinearConfig(128, 128, 64, 1, 8, 4),
        LinearConfig(128, 64, 64, 1, 4, 4),
        LinearConfig(64, 128, 64, 1, 4, 4),
        LinearConfig(64, 128, 128, 1, 4, 3),
        LinearConfig(64, 64, 64, 1, 4, 4),
        LinearConfig(64, 64, 128, 1, 4, 3),
        LinearConfig(64, 32, 128, 1, 4, 4),
        LinearConfig(64, 32, 64, 1, 4, 6),
        LinearConfig(64, 16, 128, 1, 4, 4),
        LinearConfig(32, 64, 128, 1, 4, 4),
        LinearConfig(32, 64, 128, 2, 8, 3),
        LinearConfig(32, 32, 128, 2, 4, 3),
        LinearConfig(32, 32, 128, 4, 8, 2),
        LinearConfig(16, 64, 128, 4, 8, 2),
        LinearConfig(16, 32, 128, 4, 8, 2),
        LinearConfig(16, 32, 64, 4, 4, 3),
        LinearConfig(16, 16, 128, 4, 4, 2),
    ),
    4: (
        LinearConfig(64, 64, 32, 1, 8, 3),
        LinearConfig(32, 32, 32, 1, 4, 3),
        LinearConfig(16, 32, 64, 1, 4, 3),
        LinearConfig(64, 16, 64, 1, 8, 3),
        LinearConfig(16, 16, 64, 1, 4, 3),
    ),
}
"""By bytes per element, from large to small, of equal ones the likelier first. `pinned` walks through them; the
benchmark times them all with `--all-configs`."""

MEASURED: dict[tuple[int, int, int], tuple[tuple[int, LinearConfig], ...]] = {
    (2, 128, 128): (
        (50, LinearConfig(16, 32, 128, 1, 8, 2)),
        (445, LinearConfig(16, 64, 128, 1, 8, 2)),
        (1600, LinearConfig(32, 64, 128, 1, 4, 4)),
        (113920, LinearConfig(64, 128, 64, 1, 4, 4)),
    ),
    (2, 128, 512): (
        (50, LinearConfig(16, 16, 128, 4, 4, 2)),
        (445, LinearConfig(64, 32, 128, 1, 4, 5)),
        (1600, LinearConfig(64, 64, 64, 1, 4, 4)),
        (113920, LinearConfig(64, 128, 64, 1, 4, 4)),
    ),
    (2, 256, 128): (
        (49, LinearConfig(16, 64, 128, 1, 8, 2)),
        (1568, LinearConfig(16, 64, 128, 1, 8, 2)),
        (12544, LinearConfig(128, 256, 64, 1, 8, 3)),
    ),
    (2, 384, 128): (
        (50, LinearConfig(16, 64, 128, 1, 8, 2)),
        (445, LinearConfig(32, 64, 128, 1, 8, 3)),
        (1600, LinearConfig(32, 64, 128, 1, 8, 3)),
        (113920, LinearConfig(32, 64, 128, 1, 4, 4)),
    ),
    (2, 512, 128): (
        (50, LinearConfig(16, 32, 128, 1, 8, 2)),
        (445, LinearConfig(32, 64, 128, 1, 8, 3)),
        (1600, LinearConfig(64, 128, 64, 1, 4, 4)),
        (113920, LinearConfig(128, 256, 64, 1, 8, 3)),
    ),
    (2, 512, 512): (
        (50, LinearConfig(16, 16, 128, 4, 4, 2)),
        (445, LinearConfig(64, 64, 128, 1, 4, 4)),
        (12800, LinearConfig(64, 128, 64, 1, 4, 4)),
        (113920, LinearConfig(128, 256, 64, 1, 8, 3)),
    ),
    (2, 512, 2048): ((445, LinearConfig(64, 64, 64, 1, 4, 8)),),
    (2, 768, 128): (
        (49, LinearConfig(16, 64, 128, 1, 8, 2)),
        (1568, LinearConfig(32, 64, 128, 1, 8, 3)),
        (12544, LinearConfig(128, 256, 64, 1, 8, 3)),
    ),
    (2, 1152, 512): ((49, LinearConfig(64, 32, 64, 1, 4, 6)),),
    (2, 1536, 512): ((50, LinearConfig(64, 32, 128, 1, 4, 5)), (445, LinearConfig(64, 128, 64, 1, 4, 5))),
    (2, 2048, 512): ((50, LinearConfig(64, 64, 128, 1, 4, 3)), (445, LinearConfig(64, 128, 64, 1, 4, 5))),
    (2, 3200, 512): ((49, LinearConfig(64, 64, 64, 1, 4, 8)),),
    (4, 3, 128): ((445, LinearConfig(16, 4, 128, 1, 4, 2)), (14240, LinearConfig(16, 4, 128, 1, 2, 2))),
}
"""(bytes per element, N, K) -> (most rows, configuration), rising: the fastest of a measurement on an H200."""

NARROW = (
    LinearConfig(32, 4, 128, 1, 4, 2),
    LinearConfig(16, 4, 128, 1, 4, 2),
    LinearConfig(16, 4, 128, 1, 8, 2),
    LinearConfig(16, 4, 128, 1, 2, 2),
    LinearConfig(32, 4, 128, 1, 8, 2),
)
"""For up to 4 features, as coordinates: most of 16 columns would be multiplied for nothing. The first is for many rows,
the second for few of them with float32 weights, which have no tensor cores either."""
_MANY_ROWS = 2048

_FILLED = 100
"""Programs that keep a large GPU busy: nearly one for each of its about 130 multiprocessors."""


def pinned(rows: int, features: int, width: int, element_size: int) -> LinearConfig:
    """The configuration of a shape.

    A measured one where there is one for this N and K and at least so many rows. Else the largest tile, not twice as
    wide as the output, that still makes enough programs: large tiles read rows and weights fewer times, but a tile's
    work is one after the other, so that small batches want many small ones. If not even the smallest makes enough, it
    is taken. The depth of a step and the shares end where `width` ends.

    Args:
        rows: tokens of all samples together.
        features: N.
        width: K.
        element_size: bytes per element of x.
    """
    for most, config in MEASURED.get((element_size, features, width), ()):
        if rows <= most:
            return config
    if features <= NARROW[0].columns and (rows > _MANY_ROWS or element_size == 4):
        return fitted(NARROW[0 if rows > _MANY_ROWS else 1], width)
    tiles = [tile for tile in TILES[element_size] if tile.columns == 16 or tile.columns < 2 * features]
    chosen = next((tile for tile in tiles if _programs(tile, rows, features) >= _FILLED), tiles[-1])
    return fitted(chosen, width)


def _programs(tile: LinearConfig, rows: int, features: int) -> int:
    return -(-rows // tile.rows) * -(-features // tile.columns)


def fitted(tile: LinearConfig, width: int) -> LinearConfig:
    """The tile without shares and depth that would lie beyond the width."""
    depth, shares = tile.depth, tile.shares
    while shares > 1 and depth * shares // 2 >= width:
        shares //= 2
    while depth > 16 and depth * shares // 2 >= width:
        depth //= 2
    return tile._replace(depth=depth, shares=shares)


def problem(config: LinearConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    if config.columns < 16 and config.shares > 1:
        return f"shares must be 1 with {config.columns} columns, got {config.shares}"
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    return None
