"""Tiles of the kernel for two 1 x 1 convolutions that are added: which there are, and what was measured."""

from __future__ import annotations

from typing import NamedTuple

from fastmetro_kernels.convolution.configs import SHARED_BYTES


class JoinConfig(NamedTuple):
    """Tile of one program.

    Attributes:
        rows: positions of a tile (64, 128 or 256).
        columns: output channels of a tile (64, 128 or 256).
        depth: channels of a step (32 or 64).
        warps: 4 or 8.
        stages: steps that are loaded ahead, and the one that is multiplied (2 to 5).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_ACCEPTED = {
    "rows": (64, 128, 256),
    "columns": (64, 128, 256),
    "depth": (32, 64),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}

TILES = (
    JoinConfig(128, 128, 64, 8, 3),
    JoinConfig(128, 256, 64, 8, 3),
    JoinConfig(128, 256, 64, 8, 4),
    JoinConfig(128, 128, 64, 8, 4),
    JoinConfig(128, 128, 64, 4, 3),
    JoinConfig(128, 128, 64, 4, 4),
    JoinConfig(256, 128, 64, 8, 3),
    JoinConfig(64, 256, 64, 4, 3),
    JoinConfig(64, 256, 64, 4, 4),
    JoinConfig(64, 256, 64, 8, 3),
    JoinConfig(64, 128, 64, 4, 4),
    JoinConfig(128, 64, 64, 4, 4),
    JoinConfig(128, 256, 32, 8, 5),
    JoinConfig(128, 128, 32, 8, 5),
    JoinConfig(128, 128, 64, 8, 2),
    JoinConfig(128, 256, 64, 8, 2),
    JoinConfig(64, 256, 64, 4, 2),
)
"""What the benchmark times; the first is the kernel's where nothing was measured."""
_FEW_STEPS = 4
"""Up to so many, two stages can hide a tile's loads: what they leave of the shared memory is room for another tile."""

MEASURED: dict[tuple[int, int, int, int, int], JoinConfig] = {}
"""(positions of all images, channels, channels of the second input, outputs, stride of the second convolution) -> the
fastest tile, where it is faster than what `convolution` takes: on an H200, in float16."""


def tiles(channels: int, second: int, outputs: int) -> tuple[JoinConfig, ...]:
    """The tiles of `TILES` that are worth timing for so many channels: none as wide as twice the output, no more stages
    than there are steps to load and one, and two of them only for few steps."""

    def fits(tile: JoinConfig) -> bool:
        many_steps = steps(channels, tile.depth) + steps(second, tile.depth) > _FEW_STEPS
        return (tile.columns == 64 or tile.columns < 2 * outputs) and not (tile.stages == 2 and many_steps)

    return tuple(dict.fromkeys(fitted(tile, channels, second) for tile in TILES if fits(tile)))


def fitted(tile: JoinConfig, channels: int, second: int) -> JoinConfig:
    """The tile without stages that would have nothing to load."""
    return tile._replace(stages=min(tile.stages, steps(channels, tile.depth) + steps(second, tile.depth) + 1))


def steps(channels: int, depth: int) -> int:
    """Steps of so many channels."""
    return -(-channels // depth)


def problem(config: JoinConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    needed = 2 * (config.rows + config.columns) * config.depth * config.stages
    if needed > SHARED_BYTES:
        return f"{tuple(config)} needs {needed} bytes of shared memory, a multiprocessor has {SHARED_BYTES}"
    return None
