"""What `auto` takes for a convolution: by the measured table, else by a rule. Nothing is ever measured in a call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fastmetro_kernels.convolution.configs import ConvolutionConfig, PairConfig, pinned
from fastmetro_kernels.convolution.table import Family, Layer, read_file
from fastmetro_kernels.tuning.choice import family_of
from fastmetro_kernels.tuning.reader import shipped_and_own

ENVIRONMENT = "FASTMETRO_KERNELS_CONVOLUTIONS"
"""Names a file whose families take the place of those that are shipped. Read when a call first needs it."""

Tiles = Mapping[Layer, ConvolutionConfig | PairConfig | None]
"""What takes a layer: the kernel with a tile, the kernel of a pair, or None: the library, or two convolutions."""

SHIPPED = Path(__file__).with_name("measured.json")

MOST_IMAGES = 8
MOST_ROWS = MOST_IMAGES * 56 * 56
"""Layers that are not in the table get the kernel up to so many images and output positions of all images: those of
ResNet-50's first stage at batch 8. Beyond them the library's larger tiles fill the device."""


@functools.cache
def families() -> Mapping[str, Family]:
    """The measured families by compute capability: those of the user's file, else the shipped ones.

    Raises:
        TuningFileError: the file is malformed or cannot be read.
    """
    return shipped_and_own(SHIPPED, ENVIRONMENT, read_file)


def reset() -> None:
    """Forgets what was read, so that the next call reads the files again."""
    families.cache_clear()
    _entries.cache_clear()


@functools.cache
def _entries(family: str | None) -> Tiles:
    if family is None:
        return {}
    return {entry.layer: entry.config for entry in families().get(family, Family()).entries}


def by_rule(layer: Layer) -> ConvolutionConfig | None:
    """The kernel's tile for a layer that was not measured, or None: the library is to take it."""
    if not 1 <= layer.images <= MOST_IMAGES or layer.shape.rows > MOST_ROWS or layer.scale > 1:
        return None
    return pinned(layer.shape)


_trial: Tiles = {}


@contextlib.contextmanager
def trial(tiles: Tiles) -> Iterator[None]:
    """For measurements: within, these tiles go before those of the table. Not for several threads."""
    global _trial
    before, _trial = _trial, tiles
    try:
        yield
    finally:
        _trial = before


def choose(device: torch.device, layer: Layer) -> ConvolutionConfig | None:
    """The tile with which `auto` runs the kernel for a layer on a device that can, or None: the library."""
    measured = _trial if layer in _trial else _entries(family_of(device))
    found = measured[layer] if layer in measured else by_rule(layer)
    return found if isinstance(found, ConvolutionConfig) else None


def choose_pair(device: torch.device, layer: Layer) -> PairConfig | None:
    """The cut with which `auto` makes two convolutions in one kernel, or None: nothing unmeasured is."""
    measured = _trial if layer in _trial else _entries(family_of(device))
    found = measured.get(layer)
    return found if isinstance(found, PairConfig) else None
