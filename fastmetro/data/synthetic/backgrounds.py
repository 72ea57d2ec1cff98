"""What stands behind and in front of the person: backgrounds, clutter and occluders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.synthetic.photographs import sample_photographs

_NOISE_CELLS = (2, 4, 8, 16, 32, 64, 112)


def _pixel_grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x, y) of the pixel centres in [-1, 1], shaped [1, 1, 1, size] and [1, 1, size, 1]."""
    steps = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    return steps.view(1, 1, 1, size), steps.view(1, 1, size, 1)


def _per_sample(value: Tensor) -> Tensor:
    return value.view(value.shape[0], -1, 1, 1)


def random_colours(rng: CounterRandom, name: str, count: int) -> Tensor:
    """float32 [B, count, 3, 1, 1] in 0..1; dull colours are much more frequent than vivid ones, as in rooms."""
    colours = rng.uniform(f"{name}/rgb", count, 3, 1, 1)
    grey = colours.mean(dim=2, keepdim=True)
    return grey + rng.uniform(f"{name}/saturation", count, 1, 1, 1) ** 1.5 * (colours - grey)


def noise_grids(rng: CounterRandom) -> list[Tensor]:
    """The colour noise's numbers, -0.5..0.5: [B, 3, cells, cells] for each of its scales, the coarsest first."""
    return [rng.uniform(f"noise/{cells}", 3, cells, cells) - 0.5 for cells in _NOISE_CELLS]


def _noise(rng: CounterRandom, grids: list[Tensor], size: int) -> Tensor:
    """Colour noise at several scales, each with its own random strength: [B, 3, size, size] in 0..1."""
    total = random_colours(rng, "noise/base", 1)[:, 0].expand(-1, 3, size, size)
    colourful = rng.uniform("noise/colourful", 1, 1, 1) ** 1.5
    for cells, grid in zip(_NOISE_CELLS, grids, strict=True):
        coarse = grid[:, :1] + colourful * (grid - grid[:, :1])
        strength = rng.uniform(f"noise/strength/{cells}", 1, 1, 1) ** 2
        total = total + 0.9 * strength * F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return total.clamp(0, 1)


def _scene(rng: CounterRandom, size: int) -> Tensor:
    """Two plain surfaces, such as a wall and a floor, each with a gradient and faint stripes."""
    x, y = _pixel_grid(size, rng.device)
    horizon = _per_sample(rng.uniform("scene/horizon", low=-0.4, high=1.1))
    tilt = _per_sample(0.15 * rng.normal("scene/tilt"))
    blend = ((y - horizon - tilt * x) * (size / 2)).clamp(-0.5, 0.5) + 0.5
    planes = []
    for plane in ("wall", "floor"):
        colours = random_colours(rng, f"scene/{plane}/colours", 2)
        near = colours[:, 0] + 0.5 * (colours[:, 1] - colours[:, 0])
        angle = _per_sample(rng.uniform(f"scene/{plane}/angle", high=6.283))
        along = x * angle.cos() + y * angle.sin()
        frequency = _per_sample(rng.uniform(f"scene/{plane}/frequency", low=3, high=60))
        strength = (
            0.12
            * _per_sample(rng.uniform(f"scene/{plane}/stripes"))
            * _per_sample(rng.chance(f"scene/{plane}/striped", 0.5).float())
        )
        planes.append(colours[:, 0] + (near - colours[:, 0]) * (along + 1) / 2 + strength * (along * frequency).sin())
    return (planes[0] + blend * (planes[1] - planes[0])).clamp(0, 1)


def draw_shapes(
    image: Tensor,
    rng: CounterRandom,
    name: str,
    count: int,
    probability: float,
    sizes: tuple[float, float],
    texture: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw up to ``count`` turned rectangles and ellipses with gradients and stripes over [B, 3, S, S].

    Each shape is there with ``probability``; its half axes lie between ``sizes`` (the image is 2 wide). Half of
    the shapes take their pixels from ``texture`` [B, 3, S, S], where it is given. Returns the image and what the
    shapes leave visible of what lies behind, [B, 1, S, S] in 0..1.
    """
    size = image.shape[-1]
    x, y = _pixel_grid(size, image.device)
    visible = torch.ones_like(image[:, :1])
    for number in range(count):
        key = f"{name}/{number}"
        place = rng.uniform(f"{key}/place", 2, low=-1.1, high=1.1)
        axes = rng.uniform(f"{key}/axes", 2) ** 1.5 * (sizes[1] - sizes[0]) + sizes[0]
        angle = rng.uniform(f"{key}/angle", high=3.1416)
        cos, sin = _per_sample(angle.cos()), _per_sample(angle.sin())
        dx, dy = x - _per_sample(place[:, 0]), y - _per_sample(place[:, 1])
        u, v = (cos * dx + sin * dy) / _per_sample(axes[:, 0]), (cos * dy - sin * dx) / _per_sample(axes[:, 1])
        radius = torch.where(
            _per_sample(rng.chance(f"{key}/ellipse", 0.5)), (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
        )
        edge = _per_sample(axes.min(dim=1).values * (size / 2))
        there = _per_sample(rng.chance(f"{key}/there", probability).float())
        alpha = there * ((1 - radius) * edge + 0.5).clamp(0, 1)
        colours = random_colours(rng, f"{key}/colours", 2)
        waves = 0.5 + 0.5 * (u * _per_sample(rng.uniform(f"{key}/waves", high=12))).sin()
        paint = colours[:, 0] + (colours[:, 1] - colours[:, 0]) * torch.where(
            _per_sample(rng.chance(f"{key}/striped", 0.4)), waves, 0.25 * (u + 1)
        )
        if texture is not None:
            paint = torch.where(_per_sample(rng.chance(f"{key}/textured", 0.5)), texture, paint)
        image = image + alpha * (paint - image)
        visible = visible * (1 - alpha)
    return image, visible


def draw_background(rng: CounterRandom, grids: list[Tensor], tiles: Tensor | None, size: int) -> Tensor:
    """float32 [B, 3, size, size] in 0..1: noise, plain surfaces or a photograph, with clutter on some of them.

    ``grids`` are :func:`noise_grids`; ``tiles`` the photographs, float [3, P, T, T] in 0..1, or None for none.
    """
    kind = _per_sample(rng.choice("background/kind", (0.2, 0.25, 0.55 if tiles is not None else 0.0)))
    image = torch.where(kind == 0, _noise(rng, grids, size), _scene(rng, size))
    if tiles is not None:
        photo = sample_photographs(tiles, rng, "background/photo", size)
        gain = _per_sample(rng.uniform("background/gain", 3, low=0.7, high=1.3))
        contrast = _per_sample(rng.uniform("background/contrast", low=0.5, high=1.2))
        image = torch.where(kind == 2, (((photo - 0.5) * contrast + 0.5) * gain).clamp(0, 1), image)
    cluttered, _ = draw_shapes(image, rng, "clutter", count=4, probability=0.75, sizes=(0.03, 0.6))
    return torch.where(_per_sample(rng.chance("background/cluttered", 0.5)), cluttered, image)


def draw_occluders(image: Tensor, rng: CounterRandom, tiles: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put objects in front of the person in 4 of 10 images; returns (image, visible) as drawn."""
    texture = None if tiles is None else sample_photographs(tiles, rng, "occluder/photo", image.shape[-1])
    occluded, visible = draw_shapes(image, rng, "occluder", 3, 0.6, (0.04, 0.45), texture)
    chosen = _per_sample(rng.chance("occluder/chosen", 0.4))
    return torch.where(chosen, occluded, image), torch.where(chosen, visible, torch.ones_like(visible))
