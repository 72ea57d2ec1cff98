"""The reference backend of the crops in plain PyTorch, for every device. The specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.fused.crops.ops import FINE, CropMap

_CHUNK = 64
"""Crops that are made at a time: temporary memory stays below 1.5 GB for crops of 224 pixels."""


def render(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, places: CropMap, constants: tuple[Tensor, ...], fixed: bool
) -> Tensor:
    """Crops float32 [B, 3, S, S]; arguments as of the op, ``constants`` factor, mean and deviation."""
    factor, mean, deviation = constants
    crops = []
    for start in range(0, max(len(offsets), 1), _CHUNK):
        some = slice(start, start + _CHUNK)
        crop = _sampled(pixels, offsets[some], sizes[some], CropMap(*(one[some] for one in places)), fixed)
        unit = (crop * factor[some, :, None, None]).clamp(0, 255) / 255
        crops.append((unit - mean[:, None, None]) / deviation[:, None, None])
    return crops[0] if len(crops) == 1 else torch.cat(crops)


def _placed(places: CropMap, fixed: bool) -> tuple[Tensor, Tensor]:
    """Column and row (int64 [B, 2, 2S, 2S]) of the upper left pixel of each sample, and shares of the others."""
    matrix = places.matrix.view(-1, 2, 3, 1, 1)
    x, y = places.columns[:, None, None], places.rows[:, None, :, None]
    if fixed:
        steps = (matrix[:, :, 0] * x * 1024).round() + ((matrix[:, :, 1] * y + matrix[:, :, 2]) * 1024).round() + 16
        steps = (steps / 32).floor()
        whole = (steps / FINE).floor()
        share = (steps - FINE * whole) / FINE
    else:
        place = matrix[:, :, 0] * x + matrix[:, :, 1] * y + matrix[:, :, 2]
        whole = place.floor()
        share = place - whole
    return (whole - places.origin[:, :, None, None]).long(), share.float()


def _sampled(pixels: Tensor, offsets: Tensor, sizes: Tensor, places: CropMap, fixed: bool) -> Tensor:
    """float32 [B, 3, S, S], 0 to 255."""
    index, share = _placed(places, fixed)
    height, width = sizes[:, 0, None, None], sizes[:, 1, None, None]
    channels = torch.arange(3, device=pixels.device)[:, None, None]
    weights = places.row_weights[:, :, None] * places.column_weights[:, None, :]
    total: Tensor | None = None
    for down in (0, 1):
        for beside in (0, 1):
            x, y = index[:, 0] + beside, index[:, 1] + down
            at = offsets[:, None, None] + 3 * (y * width + x)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (at >= 0) & (at + 2 < pixels.numel())
            part = (share[:, 0] if beside else 1 - share[:, 0]) * (share[:, 1] if down else 1 - share[:, 1])
            value = pixels[torch.where(inside, at, 0)[:, None] + channels.clamp_max(pixels.numel() - 1)]
            value = value * (part * inside * weights)[:, None]
            total = value if total is None else total + value
    assert total is not None
    batch, colours, rows, columns = total.shape
    return total.view(batch, colours, rows // 2, 2, columns // 2, 2).sum(dim=(3, 5))
