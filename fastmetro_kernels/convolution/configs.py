"""Tiles of the convolution kernel: which there are, and which a shape gets."""

from __future__ import annotations

import itertools
from typing import NamedTuple

ROWS, DEPTH = 64, 64
SHARED_BYTES = 227 * 1024
ALONE_BYTES = 115 * 1024
"""Of which a multiprocessor has room for one block; as in ``csrc/convolution/operands.h``."""
MAX_STAGES = 16
COLUMNS, SPLITS, GROUPS = (32, 64, 128), (1, 2, 4, 8), (1, 2)
MOST_SCALE, REPEATED_COLUMNS, TAPS = 32, 64, 9
STAGES = (2, 3, 4, 6, 8)
"""Tried besides as many as there are chunks."""
MULTIPROCESSORS = 132
"""Of an H100 and an H200."""
MOST_TILES_TO_SPLIT, FEWEST_TILES_OF_TWO = 2 * MULTIPROCESSORS, 24
"""With more tiles there is nothing to share; with fewer of two groups most multiprocessors would stand still."""


class ConvolutionConfig(NamedTuple):
    """How a convolution is cut.

    Attributes:
        columns: output channels of a tile.
        split: blocks of a cluster that share the depth.
        stages: chunks of 64 of the depth under way at a time.
        early: whether to start before the kernel in front has ended.
        groups: of 64 positions of a tile; two without a split only.
        once: whether one copy of the pixels serves all nine taps of a 3 x 3 kernel (`near.cuh`); then a stage is a
            chunk of 64 channels under all taps.
        alone: whether a block takes so much shared memory that a multiprocessor has room for no second one of the
            kernel. Blocks that start early settle where the kernel in front leaves room, several together while
            other multiprocessors get none; these are spread.
    """

    columns: int
    split: int
    stages: int
    early: bool = True
    groups: int = 1
    once: bool = False
    alone: bool = False


class Shape(NamedTuple):
    """Sizes of a convolution: positions of all images, output channels, chunks of the depth; bytes of a copy of the
    pixels that serves all taps of a chunk of channels, or 0 where none does."""

    rows: int
    outputs: int
    chunks: int
    box: int = 0


def _ring_bytes(config: ConvolutionConfig) -> int:
    return config.stages * (config.groups * ROWS + config.columns) * DEPTH * 2


def _sum_bytes(config: ConvolutionConfig) -> int:
    return config.groups * ROWS * (config.columns + 8) * 4


def box_bytes(height: int, width: int) -> int:
    """Bytes of whole rows, with one more column, of 64 channels that 64 positions and their neighbours need."""
    pitch, rows = width + 1, 0
    for position in range(0, height * pitch, ROWS):
        rows = max(rows, (position + ROWS) // pitch - (position - 1) // pitch + 3)
    return rows * pitch * DEPTH * 2


def shared_bytes(config: ConvolutionConfig) -> int:
    """As in ``csrc/convolution/forward.cuh``."""
    sums = _sum_bytes(config) if config.split > 1 else 0
    return _ring_bytes(config) + sums + (2 * MAX_STAGES + 1) * 8 + 1024


def once_bytes(config: ConvolutionConfig, box: int) -> int:
    """Shared memory where one copy serves all taps, as in ``csrc/convolution/near.cuh``."""
    stage = -(-box // 1024) * 1024 + TAPS * config.columns * DEPTH * 2
    return config.stages * stage + (_sum_bytes(config) if config.split > 1 else 0) + (2 * MAX_STAGES + 1) * 8 + 1024


def _once_problem(config: ConvolutionConfig, chunks: int, scale: int, box: int) -> str | None:
    if not box or scale > 1:
        return "once needs a 3 x 3 convolution of stride 1 and padding 1 alone, of images of up to 255 columns"
    if config.columns not in COLUMNS[:2] or config.split not in SPLITS or config.groups > 1:
        return f"once takes {COLUMNS[:2]} columns, a split of {SPLITS} and one group, got {tuple(config)}"
    if config.split > chunks // TAPS:
        return f"split must be at most the {chunks // TAPS} chunks of channels, got {config.split}"
    if config.stages < min(-(-chunks // TAPS // config.split), 2):  # a single one is given free by the chunk behind it
        return "stages must be at least 2 where a block has several chunks of channels, got 1"
    if not 1 <= config.stages <= MAX_STAGES or once_bytes(config, box) > SHARED_BYTES:
        return f"stages must be 1 to {MAX_STAGES} and fit {SHARED_BYTES} bytes of shared memory, got {config.stages}"
    return None


def problem(config: ConvolutionConfig, chunks: int, scale: int = 1, box: int = 0) -> str | None:
    """What makes a configuration impossible for a depth of so many chunks and results that are repeated, or None."""
    if config.once:
        return _once_problem(config, chunks, scale, box)
    if config.columns not in COLUMNS:
        return f"columns must be one of {COLUMNS}, got {config.columns}"
    if scale > 1 and (config.columns > REPEATED_COLUMNS or config.groups > 1):
        return f"columns must be at most {REPEATED_COLUMNS} and groups 1 with a scale, got {tuple(config)}"
    if config.split not in SPLITS:
        return f"split must be one of {SPLITS}, got {config.split}"
    if config.split > chunks:
        return f"split must be at most the {chunks} chunks of the depth, got {config.split}"
    if config.groups not in GROUPS or (config.groups > 1 and config.split > 1):
        return f"groups must be 1, or 2 without a split, got {config.groups} and a split of {config.split}"
    if not 2 <= config.stages <= MAX_STAGES or shared_bytes(config) > SHARED_BYTES:
        return f"stages must be 2 to {MAX_STAGES} and fit {SHARED_BYTES} bytes of shared memory, got {config.stages}"
    if config.split == 1 and _ring_bytes(config) < _sum_bytes(config):
        return f"stages must hold the {_sum_bytes(config)} bytes of a tile's sums, got {config.stages}"
    return None


def usable(shape: Shape, scale: int = 1) -> list[ConvolutionConfig]:
    """All configurations that make sense for a shape with results that are repeated so often."""
    found = []
    for columns, split, groups in itertools.product(COLUMNS, SPLITS, GROUPS):
        tiles = -(-shape.rows // (groups * ROWS)) * -(-shape.outputs // columns)
        if columns > max(shape.outputs, COLUMNS[0]) or split > shape.chunks:
            continue
        if (split > 1 and tiles > MOST_TILES_TO_SPLIT) or (groups > 1 and tiles < FEWEST_TILES_OF_TWO):
            continue
        share = max(-(-shape.chunks // split), 2)
        for stages in sorted({min(share, MAX_STAGES), *(count for count in STAGES if count <= share)}):
            config = ConvolutionConfig(columns, split, stages, groups=groups)
            if problem(config, shape.chunks, scale) is None:
                found.append(config)
    return found + _usable_once(shape, scale)


def _usable_once(shape: Shape, scale: int) -> list[ConvolutionConfig]:
    found = []
    for columns, split in itertools.product(COLUMNS[:2], SPLITS):
        tiles = -(-shape.rows // ROWS) * -(-shape.outputs // columns)
        if columns > max(shape.outputs, COLUMNS[0]) or (split > 1 and tiles > MOST_TILES_TO_SPLIT):
            continue
        share = max(-(-shape.chunks // TAPS // split), 1)
        for stages in range(1, min(share, 4) + 1):
            config = ConvolutionConfig(columns, split, stages, once=True)
            if problem(config, shape.chunks, scale, shape.box) is None:
                found.append(config)
    return found


def pinned(shape: Shape, scale: int = 1) -> ConvolutionConfig:
    """By rule, until measured tables are there: wide tiles while all multiprocessors have one, else a shared depth."""
    tiles = -(-shape.rows // ROWS)
    choices = [(columns, split) for split in SPLITS for columns in reversed(COLUMNS)]
    choices = [(c, s) for c, s in choices if s <= shape.chunks and (c <= shape.outputs or c == COLUMNS[0])]
    choices = [(c, s) for c, s in choices if scale == 1 or c <= REPEATED_COLUMNS]
    filled = [(c, s) for c, s in choices if tiles * -(-shape.outputs // c) * s >= MULTIPROCESSORS]
    most = max(choices, key=lambda choice: tiles * -(-shape.outputs // choice[0]) * choice[1])
    columns, split = filled[0] if filled else most
    stages = min(max(-(-shape.chunks // split), 2), 8)
    return ConvolutionConfig(columns, split, stages)


BLOCK = 128
WIDE, NARROW = (256, 512, 1024), (64, 128, 256)
"""Outputs of the first: 128 for each block of a cluster of 2, 4 or 8; and of the second."""


class PairConfig(NamedTuple):
    """How a pair is cut.

    Attributes:
        stages: chunks of 64 of the first depth under way at a time.
        early: whether to start before the kernel in front has ended.
    """

    stages: int
    early: bool = True


def pair_bytes(narrow: int, stages: int) -> int:
    """Shared memory of a block, as in ``csrc/convolution/pair.cuh``."""
    ring = stages * (ROWS + BLOCK) * DEPTH * 2
    return ring + ROWS * BLOCK * 2 + narrow * BLOCK * 2 + ROWS * (narrow + 8) * 4 + (2 * MAX_STAGES + 2) * 8 + 1024


def pair_configs(chunks: int, narrow: int) -> list[PairConfig]:
    """All that make sense for a depth of so many chunks."""
    counts = sorted({2, 3, 4, 6, 8, max(2, min(chunks, MAX_STAGES))})
    fitting = [count for count in counts if count <= max(chunks, 2) and pair_bytes(narrow, count) <= SHARED_BYTES]
    return [PairConfig(count) for count in fitting]
