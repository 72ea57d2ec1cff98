"""Pixels as numbers that half precision holds exactly; the rest of their normalisation is the first convolution's.

Normalised pixels in float16 are off by up to 1/2000. An area of one colour is off by the same amount everywhere, which
no sum averages out: with the rounding of weights it was the largest part of what a float16 engine was off. Pixels less
a centre that lies on a grid, over a power of two, are exact. Padding then has the centre's colour instead of the
mean's, which differ by at most half of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN

UNIT = 64.0
"""Near the deviations, so that weights stay as large as they are."""
_GRIDS = {torch.float16: 1 / 8, torch.bfloat16: 1.0}
"""Spacing of numbers from 128 on (float16), and one at which all up to 256 are exact (bfloat16)."""


def exact_pixel_constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centre and scale, float32 [3], so that (pixels - centre) * scale of pixels in 0..255 is exact in `dtype`.

    The centre is ImageNet's mean to the precision of the dtype's grid; in float32 and float64 to that of float32.
    """
    return _centre(dtype).float().to(device), torch.full((3,), 1 / UNIT, device=device)


def fold_pixels(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution of exact pixels that equals one of normalised images, but where it is padded.

    Args:
        weight, bias: float64 [O, 3, h, w] and [O], of the convolution of normalised images.
        dtype: that the pixels are exact in.

    Returns:
        weight and bias, float64.
    """
    mean, deviation = (255 * torch.tensor(x, dtype=torch.float64) for x in (IMAGE_MEAN, IMAGE_DEVIATION))
    shift = ((_centre(dtype) - mean) / deviation).to(weight.device)
    scale = (UNIT / deviation).to(weight.device)
    return weight * scale[:, None, None], bias + (weight.sum((2, 3)) * shift).sum(1)


def _centre(dtype: torch.dtype) -> Tensor:
    mean = 255 * torch.tensor(IMAGE_MEAN, dtype=torch.float64)
    grid = _GRIDS.get(dtype)
    return mean.float().double() if grid is None else (mean / grid).round() * grid
