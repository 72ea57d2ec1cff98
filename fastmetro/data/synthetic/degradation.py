"""What a camera does to an image: limited resolution, blur, colour and exposure, noise, 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom

_LUMA = (0.299, 0.587, 0.114)
_BLUR_RADIUS = 3
NOISE_TILE = 512


def _per_sample(value: Tensor) -> Tensor:
    return value.view(value.shape[0], -1, 1, 1)


def gaussian_blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur of [B, C, H, W] with one ``sigma`` [B] in pixels per sample, up to about 2."""
    taps = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=image.device, dtype=image.dtype)
    weights = torch.exp(-0.5 * (taps / sigma.clamp_min(1e-2).unsqueeze(1)) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    for dim, pad in ((2, (0, 0, _BLUR_RADIUS, _BLUR_RADIUS)), (3, (_BLUR_RADIUS, _BLUR_RADIUS, 0, 0))):
        padded, length = F.pad(image, pad, mode="replicate"), image.shape[dim]
        image = sum(
            (_per_sample(weights[:, tap]) * padded.narrow(dim, tap, length) for tap in range(weights.shape[1])),
            start=torch.zeros_like(image),
        )
    return image


def _limit_resolution(image: Tensor, rng: CounterRandom) -> Tensor:
    kind = _per_sample(rng.choice("camera/resolution", (0.75, 0.18, 0.07)))
    size = image.shape[-2:]
    for choice, factor in ((1, 2), (2, 4)):
        if min(size) < factor:
            continue
        small = F.avg_pool2d(image, factor)
        image = torch.where(
            kind == choice, F.interpolate(small, size=size, mode="bilinear", align_corners=False), image
        )
    return image


def _grade(image: Tensor, rng: CounterRandom) -> Tensor:
    """Exposure, white balance, contrast, saturation and gamma."""
    exposure = rng.uniform("camera/exposure", 1, low=0.6, high=1.4)
    image = (image * _per_sample(rng.uniform("camera/gain", 3, low=0.87, high=1.13) * exposure)).clamp(0, 1)
    grey = sum((weight * image[:, c : c + 1] for c, weight in enumerate(_LUMA)), start=torch.zeros_like(image[:, :1]))
    saturation = rng.uniform("camera/saturation", low=0.5, high=1.4)
    saturation = torch.where(rng.chance("camera/monochrome", 0.05), torch.zeros_like(saturation), saturation)
    image = grey + _per_sample(saturation) * (image - grey)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    image = mean + _per_sample(rng.uniform("camera/contrast", low=0.7, high=1.3)) * (image - mean)
    gamma = _per_sample(torch.exp(0.25 * rng.normal("camera/gamma")))
    return image.clamp(1e-4, 1) ** gamma


def noise_tile() -> Tensor:
    """float32 [3, NOISE_TILE, NOISE_TILE], standard normal, the same for everyone."""
    rows = torch.arange(NOISE_TILE)
    return CounterRandom(0, rows).normal("camera/noise tile", 3, NOISE_TILE).permute(1, 0, 2).contiguous()


def _sensor_noise(image: Tensor, rng: CounterRandom, tile: Tensor) -> Tensor:
    """Grain from a random place of the noise tile, which wraps around: hashing every pixel would cost much more."""
    strength = 0.06 * _per_sample(rng.uniform("camera/noise/strength") ** 3)
    place = rng.integers("camera/noise/place", NOISE_TILE, 2)
    steps = torch.arange(image.shape[-1], device=image.device)
    rows, columns = (((place[:, axis : axis + 1] + steps) % NOISE_TILE) for axis in (0, 1))
    flat = (rows.unsqueeze(2) * NOISE_TILE + columns.unsqueeze(1)).flatten(1)
    grain = tile.flatten(1)[:, flat].view(3, *flat.shape[:1], *image.shape[-2:]).transpose(0, 1)
    return image + strength * grain


def _cut_frame(image: Tensor, rng: CounterRandom) -> Tensor:
    """Where a crop reaches beyond its picture it is black: one or two sides of some of the images."""
    size = image.shape[-1]
    steps = (torch.arange(size, device=image.device) + 0.5) / size
    depth = 0.3 * rng.uniform("frame/depth", 4) ** 1.5 * rng.chance("frame/side", 0.4, 4)
    depth = depth * rng.chance("frame/cut", 0.15, 1)
    across = (steps >= depth[:, :1]) & (steps <= 1 - depth[:, 1:2])
    down = (steps >= depth[:, 2:3]) & (steps <= 1 - depth[:, 3:])
    return image * (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1)


def photograph(image: Tensor, rng: CounterRandom, tile: Tensor) -> Tensor:
    """float [B, 3, H, W] in 0..1 as the scene is -> uint8 as a camera takes it; ``tile`` is :func:`noise_tile`."""
    image = _limit_resolution(image, rng)
    sigma = rng.uniform("camera/blur", low=0.3, high=1.6)
    sigma = torch.where(rng.chance("camera/blurred", 0.4), sigma, torch.full_like(sigma, 0.2))
    image = _sensor_noise(_grade(gaussian_blur(image, sigma), rng), rng, tile)
    image = _cut_frame(image, rng)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
