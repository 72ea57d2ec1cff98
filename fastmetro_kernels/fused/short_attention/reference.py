"""The reference backend: attention over few keys in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        q: ``[B, L, H, D]``.
        k, v: ``[B, S, H, D]``.
        scale: Factor of the scores.

    Returns:
        ``[B, L, H, D]`` in the dtype of q, contiguous.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (tensor.to(wide).transpose(1, 2) for tensor in (q, k, v))
    weights = torch.softmax(queries @ keys.transpose(-1, -2) * scale, -1)
    return (weights @ values).transpose(1, 2).to(q.dtype).contiguous()
