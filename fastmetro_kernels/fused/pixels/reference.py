"""The reference backend of the pixels in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(pixels: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(pixels - mean) * scale`` of pixels ``[B, H, W, 3]`` in float32, rounded once: contiguous ``[B, H, W, 3]``."""
    return ((pixels.float() - mean) * scale).to(dtype).contiguous()
