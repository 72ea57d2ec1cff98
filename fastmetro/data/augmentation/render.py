"""From photographs to the network's inputs: cut in the worker, and there or on the device made a crop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmetro.compat import Compat
from fastmetro.data.augmentation.affine import cut_affine, map_affine, render_affine
from fastmetro.data.augmentation.cut import Cut, PackedCuts
from fastmetro.data.augmentation.draw import Draw
from fastmetro.data.augmentation.published import cut_published, is_small, map_published, render_published
from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN
from fastmetro_kernels.fused import render_crops


def cut_image(
    image: np.ndarray, center: np.ndarray, scale: float, draw: Draw, size: int = 224, compat: Compat | None = None
) -> Cut:
    """The pixels that a crop needs.

    Args:
        image: uint8 [H, W, 3], RGB.
        center: [2], of the box, pixels of the photograph.
        scale: side of the box / 200, pixels; positive.
        draw: of the sample.
        size: side of the crop.
        compat: "published" for the crops of the published loaders, see :mod:`fastmetro.data.augmentation.published`;
            None for those of :mod:`fastmetro.data.augmentation.affine`.
    """
    return (cut_published if compat else cut_affine)(image, center, scale, draw, size)


def finish_image(cut: Cut, draw: Draw, size: int = 224, compat: Compat | None = None) -> np.ndarray:
    """The crop as the network takes it, float32 [3, size, size], made in this process.

    Flipped (the published way; else the cut's geometry does), multiplied by the noise, clipped to 0..255, scaled to
    0..1 and normalised with ImageNet's mean and deviation.
    """
    if compat and not is_small(cut):
        return render_cuts(PackedCuts.pack([cut], [draw]), size, compat)[0].numpy()
    if not compat:
        # Whole levels: what becomes of each is looked up.
        tables = _normalised(np.arange(256, dtype=np.float32)[:, None] * np.array(draw.noise, np.float32))
        crop = render_affine(cut, size)
        return np.stack([tables[:, channel][crop[:, :, channel]] for channel in range(3)])
    crop = render_published(cut, size)
    if draw.flip:
        crop = crop[:, ::-1]
    found = np.empty((3, size, size), np.float32)
    for channel, plane in enumerate(found):  # whole planes: numbers beside each other, one constant for all
        plane[:] = np.clip(crop[:, :, channel] * draw.noise[channel], 0, 255)
        plane /= np.float32(255)
        plane -= np.float32(IMAGE_MEAN[channel])
        plane /= np.float32(IMAGE_DEVIATION[channel])
    return found


def _normalised(values: np.ndarray) -> np.ndarray:
    """float32, as the network takes it, of channels [..., 3] of 0 to 255 after the noise."""
    unit = np.clip(values, 0, 255).astype(np.float32) / np.float32(255)
    return (unit - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_DEVIATION, np.float32)


def render_cuts(cuts: PackedCuts, size: int = 224, compat: Compat | None = None) -> Tensor:
    """The same crops as of :func:`finish_image`, float32 [B, 3, size, size], made on the device of the cuts.

    One kernel on a GPU, without a wait for it. Published crops differ from the worker's by rounding
    (at most 0.01 of 255 levels), because OpenCV's positions, which it rounds to 1/32 of a pixel, are reproduced.
    Default crops differ by at most a level times the noise, because the worker's are rounded to whole levels twice and
    these are not. That is with an OpenCV that does not round the positions of uint8 images (5.0); with older ones a
    difference d of neighbouring pixels adds up to d / 32 to the worker's error.
    """
    places = map_published(cuts.geometry, cuts.flip, size) if compat else map_affine(cuts.geometry, size)
    mean, deviation = (
        torch.stack([cuts.noise.new_full((), value) for value in values]) for values in (IMAGE_MEAN, IMAGE_DEVIATION)
    )
    return render_crops(
        cuts.pixels, cuts.offsets, cuts.sizes, places, cuts.noise, mean, deviation, fixed=compat is not None
    )
