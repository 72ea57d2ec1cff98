"""The seam between the folded transformers and what computes them: linear layers with all around them, attention.

Few rows, as for one image, leave most of a GPU idle, and launches and trips through memory take the time: there one
fused kernel of ``fastmetro_kernels.fused`` does a layer norm, a product, bias, ReLU and residual. With many rows what
surrounds a product is little beside it, and the library's product is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.models.attention import dense_attention
from fastmetro_kernels import fused
from fastmetro_kernels.fused.short_attention.configs import MAX_KEYS

FUSED_ROWS = 2048
"""Rows (tokens of all images) up to which the fused kernels are used on a GPU in half precision. Not measured yet."""
_FEW_FEATURES = 16
"""Outputs up to which they are used in float32, too: the heads'. They multiply without tensor cores there."""


def _fuses(x: Tensor, features: int) -> bool:
    if not x.is_cuda or x.dim() != 3 or x.dtype == torch.float64:
        return False
    return x.shape[0] * x.shape[1] <= FUSED_ROWS and (x.dtype.itemsize == 2 or features <= _FEW_FEATURES)


def normalize(x: Tensor, epsilon: float) -> Tensor:
    """A layer norm without gain and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def project(
    x: Tensor,
    layer: tuple[Tensor, Tensor],
    epsilon: float | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(x) W^T + b) + residual, for x [B, S, C] or [B, C].

    Args:
        x: tokens.
        layer: W [N, C] and b [N] or, per token, [S, N]; constants.
        epsilon: of a layer norm without gain and shift in front; None for none.
        relu: whether act is ReLU.
        residual: [B, S, N].
    """
    weight, bias = layer
    if _fuses(x, len(weight)):
        return fused.fused_linear(
            x, weight, bias, normalize=epsilon, residual=residual, relu=relu, constant_weights=True
        )
    if epsilon is not None:
        x = normalize(x, epsilon)
    y = F.linear(x, weight, bias) if bias.dim() == 1 else F.linear(x, weight).add_(bias)
    if relu:
        y = y.relu_()
    return y if residual is None else y.add_(residual)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without mask to the tokens of an image: q [B, L, H, D], k and v [B, S, H, D] -> [B, L, H, D]."""
    few = k.shape[1] <= MAX_KEYS and q.shape[0] * q.shape[1] <= FUSED_ROWS
    if q.is_cuda and q.dtype.itemsize == 2 and few:
        return fused.short_attention(q, k, v)
    return dense_attention(q, k, v, 0.0)
