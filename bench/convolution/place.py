"""Tiles chosen again where they run: in whole trunks, where a kernel starts beside the one in front of it.

A tile with a deep ring is fast by itself, but leaves no shared memory to the kernel that follows and would start early.
So layer by layer the tiles that are nearly as fast take the place of the chosen one in the trunk's CUDA graph, pairs in
one kernel that of two, and what makes the trunk faster stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.convolution.measure import Timer
from bench.convolution.trunks import make_trunk, trunk_error, truth_of
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.folded_backbone import FoldedBackbone
from fastmetro_kernels.convolution import ConvolutionConfig, PairConfig, choice
from fastmetro_kernels.convolution.table import Layer

ROUNDS = 9
ERROR_FACTOR = 2
GAIN = 1e-3
"""A tile takes the place of another where the trunk's time is less by this part."""

Tile = ConvolutionConfig | PairConfig | None


class Settled(NamedTuple):
    """What takes a layer, and microseconds of the trunk: without a change of it, and with the best of its rivals."""

    tile: Tile
    before_us: float
    best_us: float


@torch.no_grad()
def settle(
    trunk: str,
    images: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    chosen: Mapping[Layer, Tile],
    rivals: Mapping[Layer, Sequence[Tile]],
    say: Callable[[str], None] = print,
) -> dict[Layer, Settled]:
    """The tiles with which a trunk is fastest.

    Args:
        trunk, images, side, dtype, device: of the trunk and of the images [images, 3, side, side].
        chosen: tiles of all its layers, None for the library, and of pairs, None for two kernels.
        rivals: what to try instead, for the layers in the order of the trial.
        say: gets a line at the end.

    Returns:
        What takes the layers with rivals.

    Raises:
        RuntimeError: the trunk with them is off by more than `ERROR_FACTOR` times what it was before.
    """
    backbone, pixels = make_trunk(trunk, images, side, device)
    folded, x = fold_backbone(backbone, dtype), pixels.to(dtype, memory_format=torch.channels_last)
    tiles = dict(chosen)
    first = best = microseconds(folded, x, tiles)
    found: dict[Layer, Settled] = {}
    for layer, others in rivals.items():
        before, times = best, [best]
        for tile in others:
            if tile == tiles[layer]:
                continue
            times.append(microseconds(folded, x, {**tiles, layer: tile}))
            if times[-1] < best * (1 - GAIN):
                tiles[layer], best = tile, times[-1]
        found[layer] = Settled(tiles[layer], before, min(times[1:], default=before))
    truth = truth_of(backbone, pixels)
    allowed, error = (_error(folded, x, tried, truth) for tried in (chosen, tiles))
    if not error <= ERROR_FACTOR * allowed + torch.finfo(dtype).eps:
        raise RuntimeError(f"{trunk}, {images} images: off by {error:.2e} with these tiles, by {allowed:.2e} before")
    changed = sum(one.tile != chosen[layer] for layer, one in found.items())
    say(f"  {trunk}, {images} images: {first:.1f} us with the tiles of single layers, {best:.1f} with {changed} others")
    return found


def _error(folded: FoldedBackbone, x: Tensor, tiles: choice.Tiles, truth: Tensor) -> float:
    with choice.trial(tiles):
        return trunk_error(folded(x), truth)


def microseconds(folded: FoldedBackbone, x: Tensor, tiles: choice.Tiles) -> float:
    """The fastest of some replays of the trunk with these tiles."""
    with choice.trial(tiles):
        timer = Timer([functools.partial(folded, x)], x.device)
    return min(timer.take() for _ in range(ROUNDS))
