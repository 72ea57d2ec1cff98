"""What the ops on images, [B, C, H, W], share."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(image: Tensor) -> bool:
    """Whether an image is contiguous in channels_last; taken to be so while its sizes are symbols.

    Tracing with symbols, PyTorch 2.11 does not know it even of what ``contiguous`` has just made.
    """
    if image.is_contiguous(memory_format=torch.channels_last):
        return True
    return any(isinstance(size, torch.SymInt) for size in image.shape)
