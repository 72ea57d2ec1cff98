"""The reference backend of the decoder tail in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.fused.decoder_tail.weights import TailWeights
from fastmetro_kernels.fused.short_attention import reference as short_attention


def tail(
    tokens: Tensor,
    attended: Tensor,
    k: Tensor,
    v: Tensor,
    weights: TailWeights,
    scale: float,
    cross_epsilon: float,
    feed_forward_epsilon: float,
) -> Tensor:
    """See ``decoder_tail``. In float32 (float64 for float64 tokens) but for what is multiplied next, which is rounded.

    Args:
        tokens, attended: ``[B, L, C]``.
        k, v: ``[B, S, H, D]``.
        weights: the constants.
        scale: Factor of the scores.
        cross_epsilon, feed_forward_epsilon: of the layer norms.

    Returns:
        ``[B, L, C]`` in the dtype of tokens, contiguous.
    """
    dtype = tokens.dtype
    wide = torch.promote_types(dtype, torch.float32)
    heads, dim = k.shape[2:]

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(weights, f"{name}_weight"), getattr(weights, f"{name}_bias")
        return F.linear(x.to(dtype).to(wide), weight.to(wide), bias.to(wide))

    def norm(x: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=epsilon)

    stream = tokens.to(wide) + linear(attended, "out")
    query = linear(norm(stream, cross_epsilon), "query").to(dtype).unflatten(-1, (heads, dim))
    stream = stream + linear(short_attention.attention(query, k, v, scale).flatten(2), "cross")
    hidden = linear(norm(stream, feed_forward_epsilon), "expand").relu()
    return (stream + linear(hidden, "contract")).to(dtype).contiguous()
