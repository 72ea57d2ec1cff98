"""The part of a photograph that a crop needs, and a batch of them in one piece, as they travel to a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastmetro.data.augmentation.draw import Draw


@dataclass(frozen=True)
class Cut:
    """What is left of a photograph for its crop.

    Attributes:
        pixels: uint8 [h, w, 3], RGB; 0 x 0 where box and image do not meet.
        geometry: float64 [G], how crop and pixels lie to each other, see the module that cut them.
    """

    pixels: np.ndarray
    geometry: np.ndarray


@dataclass(frozen=True)
class PackedCuts:
    """B cuts of different sizes in one piece of memory.

    Attributes:
        pixels: uint8 [N], N >= 1, the pixels of all cuts one after the other, row by row, channels last.
        offsets: int64 [B], in elements of ``pixels``.
        sizes: int64 [B, 2], height and width.
        geometry: float64 [B, G].
        flip: bool [B].
        noise: float32 [B, 3].
    """

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    geometry: Tensor
    flip: Tensor
    noise: Tensor

    @classmethod
    def pack(
        cls, cuts: Sequence[Cut], draws: Sequence[Draw], empty: Callable[..., np.ndarray] = np.empty
    ) -> PackedCuts:
        """The cuts of some samples (at least one) and their draws; ``empty`` makes the array of the pixels."""
        ends = np.cumsum([cut.pixels.size for cut in cuts])
        # One element where there are none, so that a gather from nothing still has an address.
        pixels = empty(max(int(ends[-1]), 1), np.uint8)
        pixels[-1] = 0
        for cut, end in zip(cuts, ends, strict=True):
            pixels[end - cut.pixels.size : end].reshape(cut.pixels.shape)[...] = cut.pixels  # no copy in between
        return cls(
            torch.from_numpy(pixels),
            torch.tensor([int(end) - cut.pixels.size for cut, end in zip(cuts, ends, strict=True)]),
            torch.tensor([cut.pixels.shape[:2] for cut in cuts]),
            torch.from_numpy(np.stack([cut.geometry for cut in cuts])),
            torch.tensor([draw.flip for draw in draws]),
            torch.tensor([draw.noise for draw in draws], dtype=torch.float32),
        )

    def to(self, device: torch.device | str) -> PackedCuts:
        """The same cuts on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return PackedCuts(**moved)

    def pin_memory(self) -> PackedCuts:
        """The same cuts in page-locked memory, for copies that do not block."""
        return PackedCuts(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})


def empty_cut(geometry: np.ndarray) -> Cut:
    """A cut without pixels: a black crop."""
    return Cut(np.zeros((0, 0, 3), np.uint8), geometry)
