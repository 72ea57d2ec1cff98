"""What the tests of both stems share: images as they come, and the same in the type of the weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels.fused import normalize_pixels, to_channels_last

KINDS = ("planes", "bytes")


class Images(NamedTuple):
    """Images, and what belongs to bytes."""

    x: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None

    @property
    def constants(self) -> dict[str, Tensor | None]:
        return {"mean": self.mean, "scale": self.scale}

    def made(self, dtype: torch.dtype) -> Tensor:
        """By the kernel in front: [N, 3, H, W] of this dtype in channels_last order."""
        if self.mean is None or self.scale is None:
            return to_channels_last(self.x, dtype)
        return normalize_pixels(self.x, self.mean, self.scale, dtype)


def make_images(kind: str, images: int, height: int, width: int, device: str = "cpu", shift: int = 0) -> Images:
    """Planes of which half lie in the middle between two numbers of float16, or random bytes; `shift` numbers behind
    an aligned place."""
    generator = torch.Generator().manual_seed(7 * height + width)
    numbers = 3 * images * height * width
    if kind == "planes":
        room = torch.empty(numbers + shift, device=device)
        values = (1024 * torch.randn(numbers, generator=generator)).round() / 2048 + 1
        return Images(room[shift:].copy_(values).view(images, 3, height, width))
    room = torch.empty(numbers + shift, dtype=torch.uint8, device=device)
    values = torch.randint(0, 256, (numbers,), generator=generator, dtype=torch.uint8)
    x = room[shift:].copy_(values).view(images, height, width, 3)
    mean, scale = torch.tensor([[123.7, 116.3, 103.5], [0.0171, 0.0175, 0.0174]], device=device)
    return Images(x, mean, scale)


def source_of(x: Tensor) -> int:
    """How the harnesses of the emulator number it."""
    return {torch.float32: 1, torch.uint8: 2}.get(x.dtype, 0)


def numbered(*shape: int) -> Tensor:
    """Numbers from 1 on, each once, in any order: what is 0 beside them was not among them."""
    return (1 + torch.randperm(math.prod(shape))).float().view(shape)
