"""Two-dimensional sine positional encoding of the image tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position_encoding(
    height: int, width: int, channels: int, temperature: float = 10000.0, device: torch.device | None = None
) -> Tensor:
    """Fixed encoding of a grid of image tokens, as in DETR (Carion et al., ECCV 2020, appendix A.4).

    Rows and columns are numbered from 1 and scaled so that the last one is at 2 pi. The first half of the channels
    encodes the row, the second the column; within each half, channels 2i and 2i + 1 are sine and cosine at
    frequency ``temperature ** (-4i / channels)``.

    Args:
        height: rows of the feature map.
        width: columns of the feature map.
        channels: width of the tokens, a multiple of 4.
        temperature: ratio of the highest to the lowest frequency.
        device: where the result lies.

    Returns:
        float32 ``[height * width, channels]``, tokens in row-major order.

    Raises:
        ValueError: ``channels`` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, got {channels}")
    half = channels // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = temperature**exponents

    def encode(count: int) -> Tensor:
        positions = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        angles = (positions / (count + 1e-6) * (2 * math.pi))[:, None] / frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)

    rows = encode(height)[:, None, :].expand(height, width, half)
    columns = encode(width)[None, :, :].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)
