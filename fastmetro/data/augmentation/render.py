"""From photographs to the network's inputs: cut in the worker, and there or on the device made a crop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmetro.compat import Compat
from fastmetro.data.augmentation.affine import cut_affine, grid_affine, render_affine
from fastmetro.data.augmentation.cut import Cut, Grid, PackedCuts
from fastmetro.data.augmentation.draw import Draw
from fastmetro.data.augmentation.published import cut_published, grid_published, is_small, render_published
from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN

_CHUNK = 64
"""Crops that are made at a time on a device: temporary memory stays below 1.5 GB for crops of 224 pixels."""


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
    return np.ascontiguousarray(_normalised(crop * np.array(draw.noise)).transpose(2, 0, 1))


def _normalised(values: np.ndarray) -> np.ndarray:
    """float32, as the network takes it, of channels [..., 3] of 0 to 255 after the noise."""
    unit = np.clip(values, 0, 255).astype(np.float32) / np.float32(255)
    return (unit - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_DEVIATION, np.float32)


def render_cuts(cuts: PackedCuts, size: int = 224, compat: Compat | None = None) -> Tensor:
    """The same crops as of :func:`finish_image`, float32 [B, 3, size, size], made on the device of the cuts.

    Vectorised over the batch and without a wait for the device. Published crops differ from the worker's by rounding
    (at most 0.01 of 255 levels), because OpenCV's positions, which it rounds to 1/32 of a pixel, are reproduced.
    Default crops differ by at most a level times the noise, because the worker's are rounded to whole levels twice and
    these are not. That is with an OpenCV that does not round the positions of uint8 images (5.0); with older ones a
    difference d of neighbouring pixels adds up to d / 32 to the worker's error.
    """
    crops = [_render(cuts, start, min(start + _CHUNK, len(cuts.offsets)), size, compat)
             for start in range(0, len(cuts.offsets), _CHUNK)]  # fmt: skip
    return crops[0] if len(crops) == 1 else torch.cat(crops)


def _render(cuts: PackedCuts, start: int, stop: int, size: int, compat: Compat | None) -> Tensor:
    geometry, flip = cuts.geometry[start:stop], cuts.flip[start:stop]
    grid = grid_published(geometry, flip, size) if compat else grid_affine(geometry, size)
    crop = _sample(cuts.pixels, cuts.offsets[start:stop], cuts.sizes[start:stop], grid)
    unit = (crop * cuts.noise[start:stop, :, None, None]).clamp(0, 255) / 255
    mean, deviation = (
        torch.stack([crop.new_full((1, 1), value) for value in values]) for values in (IMAGE_MEAN, IMAGE_DEVIATION)
    )
    return (unit - mean) / deviation


def _sample(pixels: Tensor, offsets: Tensor, sizes: Tensor, grid: Grid) -> Tensor:
    """float32 [B, 3, S, S], 0 to 255."""
    height, width = sizes[:, 0, None, None], sizes[:, 1, None, None]
    channels = torch.arange(3, device=pixels.device)[:, None, None]
    total: Tensor | None = None
    for down in (0, 1):
        for beside in (0, 1):
            x, y = grid.x + beside, grid.y + down
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            share = (grid.right if beside else 1 - grid.right) * (grid.lower if down else 1 - grid.lower)
            weight = share * inside * grid.rows[:, :, None] * grid.columns[:, None, :]
            index = torch.where(inside, offsets[:, None, None] + 3 * (y * width + x), 0)
            value = pixels[(index[:, None] + channels).clamp_max(pixels.numel() - 1)] * weight[:, None]
            total = value if total is None else total + value
    assert total is not None
    batch, colours, rows, columns = total.shape
    return total.view(batch, colours, rows // 2, 2, columns // 2, 2).sum(dim=(3, 5))
