"""The folds of the transformers, one function each: constants of a trained network computed once, in float64.

All are exact in exact arithmetic. What they take is described in ``fastmetro/models/transformer.py``: pre-norm layers
(paper, section 3.2) whose positional encodings enter queries and keys only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmetro.models.attention import MultiheadAttention, TokenAttention
from fastmetro.models.transformer import Decoder, DecoderLayer, EncoderLayer


class Affine(NamedTuple):
    """A linear layer as float64 tensors.

    Attributes:
        weight: [N, C].
        bias: [N], or [S, N] where it differs between the S tokens of an image.
    """

    weight: Tensor
    bias: Tensor


def affine(weight: Tensor, bias: Tensor) -> Affine:
    """A layer's parameters in float64, detached."""
    return Affine(weight.detach().double(), bias.detach().double())


def linear(layer: nn.Linear) -> Affine:
    """The same of a module."""
    return affine(layer.weight, layer.bias)


def projection(attention: MultiheadAttention, start: int, count: int) -> Affine:
    """`count` consecutive input projections of an attention: 0 = query, 1 = key, 2 = value."""
    rows = slice(start * attention.width, (start + count) * attention.width)
    return affine(attention.in_proj_weight[rows], attention.in_proj_bias[rows])


def fold_norm_affine(norm: nn.LayerNorm, after: Affine) -> Affine:
    """Gain and shift of a layer norm become part of the linear layer that reads it: W (g x + s) = (W g) x + W s."""
    gain, shift = norm.weight.detach().double(), norm.bias.detach().double()
    return Affine(after.weight * gain, after.bias + after.weight @ shift)


def fold_position(layer: Affine, position: Tensor, columns: slice) -> Affine:
    """Positional encodings [S, C] that are added to what `columns` of the outputs read become a bias per token."""
    bias = layer.bias.expand(len(position), -1).clone()
    bias[:, columns] += position.double() @ layer.weight[columns].T
    return Affine(layer.weight, bias)


def join(layers: list[Affine]) -> Affine:
    """Layers that read the same tokens, as one with all outputs side by side. Biases must be alike in shape."""
    return Affine(torch.cat([one.weight for one in layers]), torch.cat([one.bias for one in layers], dim=-1))


def fold_encoder_projection(layer: EncoderLayer, position: Tensor) -> Affine:
    """Query, key and value of an encoder layer, [3 C, C] and [S, 3 C], of normalised tokens."""
    attention = layer.self_attn
    # The position joins behind the norm's gain and shift, so its term is that of the unfolded weight.
    whole = fold_position(projection(attention, 0, 3), position, slice(0, 2 * attention.width))
    folded = fold_norm_affine(layer.norm1, projection(attention, 0, 3))
    return Affine(folded.weight, whole.bias + (folded.bias - projection(attention, 0, 3).bias))


def fold_memory_projection(decoder: Decoder, memory_norm: nn.LayerNorm, position: Tensor) -> Affine:
    """Keys and values of the cross-attention of all layers, [layers * 2 C, C] and [S, layers * 2 C].

    Of the encoder's normalised image tokens, whose norm's gain and shift are folded in, too. Layer i has the columns
    from 2 C i on: C of keys, then C of values.
    """
    parts = []
    for layer in _layers(decoder):
        attention = layer.multihead_attn
        plain = projection(attention, 1, 2)
        placed = fold_position(plain, position, slice(0, attention.width))
        folded = fold_norm_affine(memory_norm, plain)
        parts.append(Affine(folded.weight, placed.bias + (folded.bias - plain.bias)))
    return join(parts)


class Prefix(NamedTuple):
    """The part of the first decoder layer that no image reaches.

    Attributes:
        tokens: joint and vertex tokens behind self-attention and residual, float64 [L, C].
        query: their projection for the cross-attention, float64 [L, C].
    """

    tokens: Tensor
    query: Tensor


def fold_prefix(layer: DecoderLayer, tokens: Tensor, attend: TokenAttention) -> Prefix:
    """Norm 1, masked self-attention, residual, norm 2 and cross-attention query of learned tokens [L, C]."""
    attention = layer.self_attn
    tokens = tokens.detach().double()
    normed = _normed(layer.norm1, tokens)
    qkv = projection(attention, 0, 3)
    projected = (normed @ qkv.weight.T + qkv.bias).unsqueeze(0)
    q, k, v = (x.unflatten(-1, (attention.heads, -1)) for x in projected.chunk(3, -1))
    out = linear(attention.out_proj)
    tokens = tokens + attend(q, k, v, 0.0)[0].flatten(-2) @ out.weight.T + out.bias
    query = projection(layer.multihead_attn, 0, 1)
    return Prefix(tokens, _normed(layer.norm2, tokens) @ query.weight.T + query.bias)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    plain = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)
    return plain * norm.weight.detach().double() + norm.bias.detach().double()


def _layers(decoder: Decoder) -> list[DecoderLayer]:
    return [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
