"""Tiles of the kernels for two 1 x 1 convolutions that are added: which there are, and what was measured."""

from __future__ import annotations

from typing import NamedTuple

from fastmetro_kernels.convolution.configs import SHARED_BYTES


class JoinConfig(NamedTuple):
    """Tile of one program.

    Attributes:
        rows: positions of a tile (64, 128 or 256).
        columns: output channels of a tile (64, 128 or 256).
        depth: channels of a step (32 or 64); 0 where programs keep their weights, which takes all channels at once.
        warps: 4 or 8.
        stages: steps, or with a depth of 0 tiles, that are loaded ahead, and the one that is multiplied (2 to 5).
        programs: 0 where every tile has a program; 1 to 4 of a multiprocessor that keep the weights of their columns in
            shared memory and take tile after tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0


_ACCEPTED = {
    "rows": (64, 128, 256),
    "columns": (64, 128, 256),
    "depth": (0, 32, 64),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "programs": (0, 1, 2, 3, 4),
}

PLAIN = JoinConfig(128, 128, 64, 8, 3)
"""The kernel's where nothing was measured."""

DEEP = (
    PLAIN,
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
    JoinConfig(128, 256, 32, 8, 5),
    JoinConfig(128, 128, 32, 8, 5),
    JoinConfig(128, 64, 64, 4, 3),
)
SHALLOW = (
    PLAIN,
    JoinConfig(128, 256, 64, 8, 3),
    JoinConfig(64, 128, 64, 4, 3),
    JoinConfig(64, 256, 64, 4, 2),
    JoinConfig(64, 256, 32, 4, 3),
    JoinConfig(128, 64, 64, 4, 3),
)
KEEPING = (
    JoinConfig(128, 256, 0, 8, 3, 1),
    JoinConfig(128, 256, 0, 8, 2, 1),
    JoinConfig(64, 256, 0, 8, 3, 1),
    JoinConfig(64, 256, 0, 4, 2, 2),
    JoinConfig(256, 128, 0, 8, 2, 1),
    JoinConfig(128, 128, 0, 8, 3, 1),
    JoinConfig(128, 128, 0, 4, 2, 2),
    JoinConfig(64, 128, 0, 4, 3, 2),
    JoinConfig(64, 128, 0, 4, 2, 1),
)
"""What the benchmark times: with many steps, with few, and with programs that keep their weights."""

TILES = tuple(dict.fromkeys((*DEEP, *SHALLOW, *KEEPING)))
_FEW_CHANNELS = 256
"""Of both inputs together. Up to so many, a tile's loads are under way at once, and what counts is how many tiles a
multiprocessor has, so that stages must not take shared memory for nothing."""

MEASURED: dict[tuple[int, int, int, int, int], JoinConfig] = {
    (802816, 64, 64, 256, 1): JoinConfig(128, 256, 0, 8, 3, 1),  # 167.2 us, library 403.1, native 289.7
    (200704, 128, 256, 512, 2): JoinConfig(128, 128, 64, 4, 3, 0),  # 196.9 us, library 252.5, native 428.2
    (50176, 256, 512, 1024, 2): JoinConfig(128, 256, 32, 8, 5, 0),  # 172.0 us, library 194.4, native 325.0
    (12544, 512, 1024, 2048, 2): JoinConfig(128, 256, 32, 8, 5, 0),  # 151.3 us, library 153.9, native 241.3
    (100352, 64, 64, 256, 1): JoinConfig(128, 256, 0, 8, 3, 1),  # 25.5 us, library 66.0, native 39.5
    (25088, 128, 256, 512, 2): JoinConfig(128, 128, 64, 8, 3, 0),  # 25.8 us, library 42.4, native 31.6
    (6272, 256, 512, 1024, 2): JoinConfig(128, 128, 64, 8, 3, 0),  # 22.1 us, library 37.6, native 23.9
    (1568, 512, 1024, 2048, 2): JoinConfig(128, 256, 64, 8, 4, 0),  # 21.4 us, library 30.3, native 23.4
}
"""(positions of all images, channels, channels of the second input, outputs, stride of the second convolution) -> the
fastest tile, where it is faster than what `convolution` takes: on an H200, in float16."""


def tiles(channels: int, second: int, outputs: int) -> tuple[JoinConfig, ...]:
    """The tiles that are worth timing for so many channels: none twice as wide as the output, and programs keep their
    weights where these, the tiles that are loaded ahead and the output fit."""
    usual = SHALLOW if channels + second <= _FEW_CHANNELS else DEEP
    keeping = [tile for tile in KEEPING if tile.programs * kept_bytes(tile, channels, second) <= SHARED_BYTES]
    return tuple(tile for tile in (*usual, *keeping) if tile.columns == 64 or tile.columns < 2 * outputs)


def padded(channels: int) -> int:
    """Channels of a product that takes all at once: a power of 2, at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def kept_bytes(tile: JoinConfig, channels: int, second: int) -> int:
    """Shared memory of a program that keeps its weights: these, pixels, and a quarter of the sums, which is the least
    that Triton takes to bring them into order."""
    depth = padded(channels) + padded(second)
    return 2 * depth * (tile.columns + tile.rows * tile.stages) + tile.rows * tile.columns


def problem(config: JoinConfig, channels: int = 1, second: int = 1) -> str | None:
    """What makes this configuration impossible for so many channels, or None."""
    for name, value in config._asdict().items():
        if value not in _ACCEPTED[name]:
            return f"{name} must be one of {', '.join(map(str, _ACCEPTED[name]))}, got {value}"
    if (config.depth == 0) != (config.programs > 0):
        return f"depth must be 0 if, and only if, programs is not, got {config.depth} and {config.programs}"
    needed = 2 * (config.rows + config.columns) * config.depth * config.stages
    if config.programs:
        needed = kept_bytes(config, channels, second)
    if needed > SHARED_BYTES:
        return f"{tuple(config)} needs {needed} bytes of shared memory, a multiprocessor has {SHARED_BYTES}"
    return None
