"""The reference backend of the row norm in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normalize(x: Tensor, epsilon: float) -> Tensor:
    """``(x - mean) / sqrt(variance + epsilon)`` of the rows of x ``[B, M, K]``, in float32 (float64 for float64 x)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:], eps=epsilon).to(x.dtype).contiguous()
