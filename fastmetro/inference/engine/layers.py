"""The folded layers of a transformer stage: buffers in the engine's precision, and what is done with them.

Every layer can be folded again from changed parameters: the buffers are then overwritten where they lie, so that
captured graphs go on with the new weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.inference.engine.folding import (
    Affine,
    fold_encoder_projection,
    fold_norm_affine,
    linear,
    projection,
)
from fastmetro.inference.engine.onednn import WeightPacks
from fastmetro.inference.engine.products import (
    PLACES,
    Layer,
    Tokens,
    decoder_tail,
    fuses_tail,
    read,
    short_attention,
    update,
)
from fastmetro.models.attention import TokenAttention
from fastmetro.models.transformer import DecoderLayer, EncoderLayer
from fastmetro_kernels.fused import TailWeights


class Folded(nn.Module):
    """Holds constants under names; putting one again overwrites it in place."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.packs: dict[str, WeightPacks] = {}

    def put(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        """Store a float64 tensor as buffer `name`, in `dtype` or the engine's."""
        if name in self._buffers:
            self.get_buffer(name).copy_(value)
        else:
            stored = value.to(device=self.device, dtype=dtype or self.dtype).contiguous()
            self.register_buffer(name, stored, persistent=False)

    def put_affine(
        self, name: str, layer: Affine, dtype: torch.dtype | None = None, *, behind_norm: bool = False
    ) -> None:
        """Store a linear layer as buffers `name`_weight and `name`_bias.

        `behind_norm`: also `name`_sums of its rows and, with a bias per token, `name`_marked; see ``products.Layer``.
        """
        self.packs.setdefault(name, WeightPacks()).clear()
        self.put(f"{name}_weight", layer.weight, dtype)
        self.put(f"{name}_bias", layer.bias, dtype)
        if behind_norm:  # of the weight as it is stored, so that they fit what is multiplied
            self.put(f"{name}_sums", self.get_buffer(f"{name}_weight").double().sum(1), torch.float32)
            if layer.bias.dim() == 2 and len(layer.bias) <= PLACES:
                marks = F.pad(layer.bias.T, (0, PLACES - len(layer.bias)))
                self.put(f"{name}_marked", torch.cat([layer.weight, marks], 1), dtype)

    def affine(self, name: str) -> Layer:
        """A stored linear layer."""
        weight, bias = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")
        behind_norm = self._buffers.get(f"{name}_sums"), self._buffers.get(f"{name}_marked")
        return Layer(weight, bias, *behind_norm, self.packs.get(name))


class _FoldedLayer(Folded):
    """What both kinds share: the feed-forward block."""

    def fold_feed_forward(self, layer: EncoderLayer | DecoderLayer, norm: nn.LayerNorm) -> None:
        self.feed_forward_epsilon = norm.eps
        self.put_affine("expand", fold_norm_affine(norm, linear(layer.linear1)), behind_norm=True)
        self.put_affine("contract", linear(layer.linear2))

    def feed_forward(self, tokens: Tokens) -> Tokens:
        hidden = read(tokens, self.affine("expand"), self.feed_forward_epsilon, relu=True)
        return update(hidden, self.affine("contract"), tokens)


class FoldedEncoderLayer(_FoldedLayer):
    """An encoder layer; `position` [S, C] of all its tokens."""

    def __init__(self, dtype: torch.dtype, device: torch.device, heads: int) -> None:
        super().__init__(dtype, device)
        self.heads = heads

    def fold(self, layer: EncoderLayer, position: Tensor) -> None:
        """Take the constants from a layer."""
        self.epsilon = layer.norm1.eps
        self.put_affine("qkv", fold_encoder_projection(layer, position), behind_norm=True)
        self.put_affine("out", linear(layer.self_attn.out_proj))
        self.fold_feed_forward(layer, layer.norm2)

    def forward(self, tokens: Tokens) -> Tokens:
        """Update camera and image tokens [B, S, C]."""
        qkv = read(tokens, self.affine("qkv"), self.epsilon)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in qkv.chunk(3, -1))
        return self.feed_forward(update(short_attention(q, k, v).flatten(-2), self.affine("out"), tokens))


class FoldedDecoderLayer(_FoldedLayer):
    """A decoder layer. Keys and values of its cross-attention come from outside, see ``fold_memory_projection``."""

    def __init__(self, dtype: torch.dtype, device: torch.device, heads: int) -> None:
        super().__init__(dtype, device)
        self.heads = heads

    def fold(self, layer: DecoderLayer) -> None:
        """Take the constants from a layer."""
        self.epsilon, self.cross_epsilon = layer.norm1.eps, layer.norm2.eps
        self.put_affine("qkv", fold_norm_affine(layer.norm1, projection(layer.self_attn, 0, 3)), behind_norm=True)
        self.put_affine("out", linear(layer.self_attn.out_proj))
        query = fold_norm_affine(layer.norm2, projection(layer.multihead_attn, 0, 1))
        self.put_affine("query", query, behind_norm=True)
        self.fold_cross(layer)

    def fold_cross(self, layer: DecoderLayer) -> None:
        """Only what follows the cross-attention's query: for a first layer, whose beginning is constant."""
        self.put_affine("cross_out", linear(layer.multihead_attn.out_proj))
        self.fold_feed_forward(layer, layer.norm3)

    def forward(self, tokens: Tokens, memory: Tensor, attend: TokenAttention) -> Tokens:
        """Update joint and vertex tokens [B, L, C]; `memory` [B, S, 2 C]: keys and values of the image tokens."""
        qkv = read(tokens, self.affine("qkv"), self.epsilon)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in qkv.chunk(3, -1))
        attended = attend(q, k, v, 0.0)
        if fuses_tail(tokens.values, self.heads):
            return decoder_tail(tokens, attended, memory, self.tail_weights(), self.tail_epsilons())
        tokens = update(attended.flatten(-2), self.affine("out"), tokens)
        return self.cross(tokens, read(tokens, self.affine("query"), self.cross_epsilon), memory)

    def tail_weights(self) -> TailWeights:
        """All that stands behind the self-attention."""
        layers = (self.affine(name) for name in ("out", "query", "cross_out", "expand", "contract"))
        return TailWeights(*(tensor for layer in layers for tensor in layer[:2]))

    def tail_epsilons(self) -> tuple[float, float]:
        """Of the norms in front of the cross-attention and of the feed-forward block."""
        return self.cross_epsilon, self.feed_forward_epsilon

    def cross(self, tokens: Tokens, query: Tensor, memory: Tensor) -> Tokens:
        """Cross-attention and feed-forward block. `tokens` and `query` [B, L, C], or [1, L, C] where all share them."""
        q = query.unflatten(-1, (self.heads, -1)).expand(len(memory), -1, -1, -1)
        k, v = (x.unflatten(-1, (self.heads, -1)) for x in memory.chunk(2, -1))
        attended = short_attention(q, k, v).flatten(-2)
        shared = tokens._replace(values=tokens.values.expand(len(memory), -1, -1))
        return self.feed_forward(update(attended, self.affine("cross_out"), shared))
