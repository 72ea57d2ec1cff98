"""How the rows of a layer norm are shared out among programs. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

WIDEST = 16384
"""Numbers of a row, which a program holds in registers."""


class ResidualNormConfig(NamedTuple):
    """Tile of one program: rows at a time (a power of two to 64), warps (1 to 32), and programs of a launch at most.

    Programs: a multiple of the multiprocessors of a large GPU. The same number everywhere, so that sums are taken in
    the same order on every device.
    """

    rows: int
    warps: int
    programs: int


CONFIGS = tuple(
    ResidualNormConfig(rows, warps, programs)
    for rows, warps in ((1, 2), (2, 4), (4, 4), (4, 8), (8, 8))
    for programs in (264, 396, 528, 792, 1056)
)
"""What `python -m bench residual_norm --all-configs` times."""
_ACCEPTED = {"rows": (1, 2, 4, 8, 16, 32, 64), "warps": (1, 2, 4, 8, 16, 32)}


class Plan(NamedTuple):
    """Programs, rows of each but the last, rows of a tile, columns of a tile (a power of two), and warps."""

    groups: int
    rows_each: int
    rows: int
    block: int
    warps: int


def block_of(width: int) -> int:
    """Columns of a tile: a power of two, at least those that share random numbers."""
    return max(8, 1 << (width - 1).bit_length())


def pinned(width: int, backward: bool) -> ResidualNormConfig:
    """Four warps, five such programs on a multiprocessor forward and four backward; they must all be there at once.

    A lane has 16 numbers of each tensor forward: 61 KB under way on a multiprocessor in the mixed precision of a
    training step. Backward it has eight, which it keeps in registers of both sums, too.
    """
    block, lane = block_of(width), 8 if backward else 16
    warps = min(32, max(4, block // 256))
    rows = min(64, max(1, 32 * lane * warps // block))
    return ResidualNormConfig(rows, warps, 528 if backward else 660)


def plan(rows: int, width: int, backward: bool, config: ResidualNormConfig | None = None) -> Plan:
    """For so many rows, with a tile other than the pinned one if given."""
    tile = config or pinned(width, backward)
    tiles = -(-rows // tile.rows)
    each = -(-tiles // max(min(tile.programs, tiles), 1))
    return Plan(-(-tiles // max(each, 1)), each * tile.rows, tile.rows, block_of(width), tile.warps)


def problem(config: ResidualNormConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, accepted in _ACCEPTED.items():
        if (value := getattr(config, name)) not in accepted:
            return f"{name} must be one of {', '.join(map(str, accepted))}, got {value}"
    return None if config.programs >= 1 else f"programs must be at least 1, got {config.programs}"
