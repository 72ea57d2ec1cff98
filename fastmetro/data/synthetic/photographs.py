"""Photographs used as backgrounds and as textures of occluders: those that scikit-image installs with itself.

Pictures that show a person are left out: nobody in the image but the rendered body has a label.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom

PHOTOGRAPHS = (
    "brick.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
TILE = 384


def load_tiles(names: tuple[str, ...] = PHOTOGRAPHS) -> Tensor:
    """uint8 [P, 3, TILE, TILE]: each photograph scaled to cover a square; wide ones give two tiles.

    Raises:
        ImportError: if scikit-image or Pillow is not installed.
        FileNotFoundError: if the installed scikit-image does not bring one of the files.
    """
    import skimage.data
    from PIL import Image

    folder = Path(skimage.data.__file__).parent
    tiles = []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"scikit-image has no bundled picture {name!r} (looked in {folder})")
        with Image.open(folder / name) as opened:
            picture = opened.convert("RGB")
        scale = TILE / min(picture.size)
        width, height = (max(TILE, round(side * scale)) for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
        tiles.append(pixels[:TILE, :TILE])
        if max(width, height) >= 1.25 * TILE:
            tiles.append(pixels[-TILE:, -TILE:])
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()


def sample_photographs(tiles: Tensor, rng: CounterRandom, name: str, size: int) -> Tensor:
    """A random window of a random photograph per sample: float [3, P, T, T] in 0..1 -> [B, 3, size, size].

    Windows cover 0.3 to 1 of a tile, turned by up to 25 degrees and mirrored half of the time; what would lie
    outside of a tile repeats its border.
    """
    _, count, tile, _ = tiles.shape
    which = rng.integers(f"{name}/which", count)
    extent = rng.uniform(f"{name}/extent", low=0.3, high=1.0) * (tile - 1) / 2
    angle = (rng.uniform(f"{name}/angle") - 0.5) * 0.9
    mirror = torch.where(rng.chance(f"{name}/mirror", 0.5), -1.0, 1.0)
    centre = (tile - 1) / 2 + (rng.uniform(f"{name}/centre", 2) - 0.5) * (tile - 1 - 2 * extent).unsqueeze(1)
    steps = torch.linspace(-1, 1, size, device=tiles.device)
    y, x = steps.view(1, size, 1), steps.view(1, 1, size)
    cos, sin = (extent * angle.cos()).view(-1, 1, 1), (extent * angle.sin()).view(-1, 1, 1)
    u = mirror.view(-1, 1, 1) * (cos * x - sin * y) + centre[:, 0].view(-1, 1, 1)
    v = sin * x + cos * y + centre[:, 1].view(-1, 1, 1)
    # One tall picture and one call: the tiles of different samples differ only in their row offset.
    rows = v.clamp(0, tile - 1) + (which * tile).view(-1, 1, 1)
    grid = torch.stack([u.clamp(0, tile - 1) * (2 / (tile - 1)) - 1, rows * (2 / (count * tile - 1)) - 1], dim=-1)
    tall = tiles.flatten(1, 2).unsqueeze(0)
    batch = rng.batch_size
    # F.grid_sample may choose cuDNN's, which torch.compile cannot trace: bilinear, zeros outside, corners aligned.
    sampled = torch.ops.aten.grid_sampler_2d(tall, grid.view(1, batch * size, size, 2), 0, 0, True)
    return sampled.view(3, batch, size, size).transpose(0, 1)
