"""The reference backend: the cross-attention block of the two other specifications, for every device and dtype."""

from __future__ import annotations

from torch import Tensor

from fastmetro_kernels.fused.linear import reference as linear
from fastmetro_kernels.fused.short_attention import reference as attention


def block(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: float
) -> Tensor:
    """``softmax(scale q k^T) v @ weight.T + bias + residual``; what attention gives is rounded to the dtype of q.

    Args:
        q: ``[B, L, H, D]``.
        k, v: ``[B, S, H, D]``.
        weight: ``[N, H D]``.
        bias: ``[N]`` or None.
        residual: ``[B, L, N]`` or None.
        scale: Factor of the scores.

    Returns:
        ``[B, L, N]`` in the dtype of q, contiguous.
    """
    attended = attention.attention(q, k, v, scale).flatten(2)
    return linear.linear(attended, weight, bias, residual, None, None, False, q.dtype)
