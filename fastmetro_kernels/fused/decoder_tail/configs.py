"""Tiles of the decoder tail: which there are, and which one a shape gets. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

MAX_FEATURES = 128
"""Features of a row, which a program holds whole."""


class TailConfig(NamedTuple):
    """Tile of one program.

    Attributes:
        rows: tokens (16, 32, 64 or 128).
        hidden: features of the feed-forward block that are made and used up at a time (16 to 256).
        warps: 1 to 8.
        stages: steps that are loaded ahead (1 to 4).
    """

    rows: int
    hidden: int
    warps: int
    stages: int


_ACCEPTED = {"rows": (16, 32, 64, 128), "hidden": (16, 32, 64, 128, 256), "warps": (1, 2, 4, 8), "stages": (1, 2, 3, 4)}

TILES: dict[int, tuple[TailConfig, ...]] = {
    2: (
        TailConfig(64, 64, 4, 2),
        TailConfig(128, 64, 8, 2),
        TailConfig(64, 128, 4, 2),
        TailConfig(64, 64, 4, 3),
        TailConfig(64, 64, 8, 2),
        TailConfig(32, 64, 4, 2),
        TailConfig(32, 128, 4, 2),
        TailConfig(16, 64, 4, 2),
        TailConfig(16, 64, 2, 2),
    ),
    # Float32 products do not run on tensor cores but from registers.
    4: (TailConfig(16, 16, 8, 1),),
}
"""By bytes per element, the fastest on an H200 first. The benchmark times them all with `--all-configs`."""


def pinned(element_size: int) -> TailConfig:
    """The tile of a type, whatever the number of tokens: a program takes about as long with fewer rows.

    Two programs of 64 rows share a multiprocessor, and one waits while the other multiplies.
    """
    return TILES[element_size][0]


def problem(config: TailConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    return None
