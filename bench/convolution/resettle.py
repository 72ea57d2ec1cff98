"""A table of tiles settled once more in whole trunks, from the tiles that it has.

`spread` settles which layers' blocks are alone on a multiprocessor, `place_tiles` also how layers are cut: what a tile
is in the chain, where its blocks settle between those of the kernel in front, its time by itself does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bench import common
from bench.convolution import place
from bench.convolution.layers import used_pairs
from bench.convolution.tune import Uses
from fastmetro_kernels.convolution import ConvolutionConfig, choice, pair_configs, table
from fastmetro_kernels.convolution.configs import ALONE_BYTES, ROWS, once_bytes, shared_bytes, usable
from fastmetro_kernels.convolution.table import Layer
from fastmetro_kernels.tuning import command
from fastmetro_kernels.tuning.choice import family_of

FEWEST, MOST = 40, 232
"""Blocks of a tile that is worth a trial."""
MIDDLE_STAGES = 4

Say = Callable[[str], None]
Tiles = dict[Layer, place.Tile]
Settle = Callable[[str, int, Tiles], Tiles]
"""From a trunk, a number of images and the tiles of its layers and pairs to what is faster."""


def spread(uses: Uses, side: int, dtype: torch.dtype, device: torch.device, path: Path, say: Say = print) -> None:
    """Settles only which layers' blocks are alone on a multiprocessor, from all or from none on, whichever ends better.

    All else stays as in the file, or as shipped. What one trunk has settled stays for those that follow.

    Raises:
        TuningFileError: the file is there and is no table of convolutions.
    """

    def settle(trunk: str, images: int, tiles: Tiles) -> Tiles:
        cut = {layer: tile for layer, tile in tiles.items() if isinstance(tile, ConvolutionConfig)}
        ends = []
        for start in (False, True):
            chosen = {layer: tile._replace(alone=start) for layer, tile in cut.items()}
            rivals = {layer: (tile._replace(alone=not start),) for layer, tile in chosen.items()}
            settled = place.settle(trunk, images, side, dtype, device, chosen, rivals, say)
            best = min((min(one.before_us, one.best_us) for one in settled.values()), default=0.0)
            ends.append((best, {layer: one.tile for layer, one in settled.items()}))
        return min(ends, key=lambda end: end[0])[1]

    _resettle(uses, side, device, path, settle)


def place_tiles(uses: Uses, side: int, dtype: torch.dtype, device: torch.device, path: Path, say: Say = print) -> None:
    """Settles how layers are cut, the layers with the most numbers to multiply first, and which pairs are one kernel.

    Raises:
        TuningFileError: the file is there and is no table of convolutions.
    """

    def settle(trunk: str, images: int, tiles: Tiles) -> Tiles:
        order = sorted(tiles, key=lambda layer: -layer.shape.rows * layer.outputs * layer.shape.chunks)
        rivals: dict[Layer, tuple[place.Tile, ...]] = {layer: rivals_of(layer) for layer in order}
        settled = place.settle(trunk, images, side, dtype, device, tiles, rivals, say)
        return {layer: one.tile for layer, one in settled.items()}

    _resettle(uses, side, device, path, settle)


def rivals_of(layer: Layer) -> tuple[place.Tile, ...]:
    """What is worth a trial for a layer or a pair: tiles with some depths of a ring, also alone where that differs."""
    if layer.following:
        return (None, *pair_configs(layer.shape.chunks, layer.following))
    found: list[place.Tile] = []
    tiles = usable(layer.shape, layer.scale)
    deepest: dict[ConvolutionConfig, int] = {}
    for tile in tiles:
        cut = tile._replace(stages=0)
        deepest[cut] = max(deepest.get(cut, 0), tile.stages)
    for tile in tiles:
        if (
            tile.stages not in (deepest[tile._replace(stages=0)], MIDDLE_STAGES)
            or not FEWEST <= blocks(layer, tile) <= MOST
        ):
            continue
        found.append(tile)
        needed = once_bytes(tile, layer.shape.box) if tile.once else shared_bytes(tile)
        if needed < ALONE_BYTES:
            found.append(tile._replace(alone=True))
    return tuple(found)


def blocks(layer: Layer, tile: ConvolutionConfig) -> int:
    """About how many a tile makes of a layer; with one copy for all taps rows have one more column."""
    height, width = layer.output
    rows = (
        layer.images * -(-height * (width + 1) // ROWS) if tile.once else -(-layer.shape.rows // (tile.groups * ROWS))
    )
    return tile.split * rows * -(-layer.outputs // tile.columns)


def _resettle(uses: Uses, side: int, device: torch.device, path: Path, settle: Settle) -> None:
    """For every trunk and number of images; the file is written after each."""
    family = family_of(device)
    assert family is not None  # the command looked
    kept: Mapping[str, table.Family] = table.read_file(path) if path.exists() else choice.families()
    record = command.record(device) | {"command": common.command_line()[:1000]}
    done: set[Layer] = set()
    for trunk, counts in uses.items():
        for images in sorted({used.layer.images for used in counts}):
            entries = {entry.layer: entry for entry in kept.get(family, table.Family()).entries}
            single = (used.layer for used in counts if used.layer.images == images)
            layers = [layer for layer in dict.fromkeys((*single, *used_pairs(trunk, images, side))) if layer in entries]
            tiles = {layer: entries[layer].config for layer in layers if layer not in done}
            native = {layer: tile for layer, tile in tiles.items() if tile is not None or layer.following}
            if not native:
                continue
            found = settle(trunk, images, native)
            kept = table.merged(kept, family, record, [replace(entries[one], config=found[one]) for one in found])
            table.write_file(path, kept)
            done |= set(native)
