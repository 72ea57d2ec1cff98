"""Pixels to the network's input on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN
from fastmetro.inference.images import CROP_SIZE


def check_images(images: Tensor) -> None:
    """What an engine takes: uint8 [B, S, S, 3], or floating point [B, 3, H, W].

    Raises:
        TypeError: another dtype.
        ValueError: another shape.
    """
    shape = list(images.shape)
    if images.dtype == torch.uint8:
        if images.dim() != 4 or shape[3] != 3 or shape[1] != shape[2] or shape[1] == 0:
            raise ValueError(f"images: uint8 pixels must be square crops [B, S, S, 3], got {shape}")
    elif images.dtype.is_floating_point:
        if images.dim() != 4 or shape[1] != 3:
            raise ValueError(f"images: normalised images must be [B, 3, H, W], got {shape}")
    else:
        raise TypeError(f"images must be uint8 pixels or floating point, got {images.dtype}")


def resize(pixels: Tensor, size: int = CROP_SIZE) -> Tensor:
    """uint8 [B, S, S, 3] -> [B, size, size, 3], with antialiasing; float32 in 0..255 where it had to be resized."""
    if pixels.shape[1] == size:
        return pixels
    planes = pixels.permute(0, 3, 1, 2).float()
    resized = F.interpolate(planes, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1)


def pixel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean, and one over its deviation, of pixels in 0..255: float32 [3] each, for `normalize_pixels`."""
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float64) * 255
    scale = 1 / (torch.tensor(IMAGE_DEVIATION, dtype=torch.float64) * 255)
    return mean.float().to(device), scale.float().to(device)
