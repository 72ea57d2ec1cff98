"""The seam between the folded transformers and what computes them: linear layers with all around them, attention.

On a GPU in half precision a product of few rows, or of a narrow layer, takes less time than what surrounds it: launches
and trips through memory. There one fused kernel of ``fastmetro_kernels.fused`` does a layer norm, a product, bias, ReLU
and residual. A wide product of many rows is the library's (``python -m bench fused``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.models.attention import dense_attention
from fastmetro_kernels import fused
from fastmetro_kernels.fused.short_attention.configs import MAX_KEYS

FEW_ROWS = 512
"""Rows (tokens of all images) up to which every layer is fused."""
NARROW = 128
"""Features (of the input or of the output) up to which a layer is fused whatever the number of rows."""
RESIDUAL_WIDTH = 512
"""Features of the input up to which a layer with a residual is: the library would need a pass of its own for that."""
_FEW_FEATURES = 16
"""Outputs up to which float32 weights are fused, too: the heads'. They multiply without tensor cores there."""


class Layer(NamedTuple):
    """A linear layer of constants.

    Attributes:
        weight: [N, K].
        bias: [N] or, per token, [S, N].
        sums: float32 [N], of the rows of the weight, where it stands behind a layer norm; else None.
    """

    weight: Tensor
    bias: Tensor
    sums: Tensor | None = None


def _fuses(x: Tensor, layer: Layer, residual: bool) -> bool:
    features, width = layer.weight.shape
    if not x.is_cuda or x.dim() != 3 or x.dtype == torch.float64:
        return False
    if layer.weight.dtype.itemsize == 4:
        return features <= _FEW_FEATURES
    narrow = min(features, width) <= NARROW or (residual and width <= RESIDUAL_WIDTH)
    return narrow or x.shape[0] * x.shape[1] <= FEW_ROWS


def normalize(x: Tensor, epsilon: float) -> Tensor:
    """A layer norm without gain and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def project(
    x: Tensor,
    layer: Layer,
    epsilon: float | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    leading: Tensor | None = None,
) -> Tensor:
    """act(norm(x) W^T + b) + residual, for x [B, S, C], in the dtype of W.

    Args:
        x: tokens; where W has another dtype, they are cast to it.
        layer: the constants.
        epsilon: of a layer norm without gain and shift in front; None for none.
        relu: whether act is ReLU.
        residual: [B, S, N].
        leading: [B, P, N] tokens that are put in front of the result's; not with a residual.
    """
    weight, bias, sums = layer
    if _fuses(x, layer, residual is not None):
        return fused.fused_linear(
            x, weight, bias, normalize=epsilon, weight_sums=None if epsilon is None else sums, residual=residual,
            leading=leading, relu=relu, out_dtype=weight.dtype, constant_weights=True,
        )  # fmt: skip
    x = x.to(weight.dtype)
    if epsilon is not None:
        x = normalize(x, epsilon)
    y = _library_product(x, weight, bias, relu)
    if residual is not None:
        y = y.add_(residual)
    return y if leading is None else torch.cat([leading, y], dim=1)


def _library_product(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """act(x W^T + b) with an epilogue for bias and ReLU where cuBLASLt has one."""
    if relu and x.is_cuda and bias.dim() == 1 and x.dtype.itemsize == 2:
        return torch._addmm_activation(bias, x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])
    y = F.linear(x, weight, bias) if bias.dim() == 1 else F.linear(x, weight).add_(bias)
    return y.relu_() if relu else y


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without mask to the tokens of an image: q [B, L, H, D], k and v [B, S, H, D] -> [B, L, H, D].

    The fused kernel is faster than any of the library's at every batch size that was measured (1 to 256).
    """
    if q.is_cuda and q.dtype.itemsize == 2 and k.shape[1] <= MAX_KEYS:
        return fused.short_attention(q, k, v)
    return dense_attention(q, k, v, 0.0)
