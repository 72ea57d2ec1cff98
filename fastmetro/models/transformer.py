"""The encoder-decoder transformer of FastMETRO: one of the two stages (paper, section 3.2 and figure 3).

Pre-norm layers with ReLU feed-forward blocks; positional encodings enter keys and encoder queries, never values;
the encoder and the decoder end in a layer norm. Tensors are batch first, unlike the published code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.models.attention import MultiheadAttention, TokenAttention, dense_attention
from fastmetro.models.fused_transformer import FUSED, decode, encode, takes_fused


class _Layer(nn.Module):
    """What encoder and decoder layers share: dropout and the feed-forward block."""

    def __init__(self, width: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)

    @property
    def dropout_p(self) -> float:
        """The dropout probability now: zero in evaluation."""
        return self.dropout if self.training else 0.0

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self._drop(F.relu(self.linear1(x))))


class EncoderLayer(_Layer):
    """Self-attention among camera and image tokens, then a feed-forward block."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__(width, feedforward, dropout)
        self.self_attn = MultiheadAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Update tokens [B, S, C]; `position` [S, C] is added to queries and keys."""
        x = self.norm1(tokens)
        q, k = self.self_attn.query_key(x + position)
        attended = dense_attention(q, k, self.self_attn.value(x), self.dropout_p)
        tokens = tokens + self._drop(self.self_attn.merge(attended))
        return tokens + self._drop(self._feed_forward(self.norm2(tokens)))


class DecoderLayer(_Layer):
    """Masked self-attention among joint and vertex tokens, cross-attention to the image, a feed-forward block."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__(width, feedforward, dropout)
        self.self_attn = MultiheadAttention(width, heads)
        self.multihead_attn = MultiheadAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, memory: Tensor, position: Tensor, attend: TokenAttention) -> Tensor:
        """Update the joint and vertex tokens.

        Args:
            tokens: [B, L, C], or [1, L, C] where all samples share the tokens. Whatever does not yet depend on
                the sample is then computed once: the whole self-attention, or under dropout its projections.
            memory: encoded image tokens [B, S, C].
            position: [S, C], added to the keys of the cross-attention.
            attend: the masked self-attention.
        """
        batch = memory.shape[0]
        q, k, v = self.self_attn.query_key_value(self.norm1(tokens))
        if self.dropout_p > 0.0:  # dropout differs between samples
            q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
        tokens = tokens + self._drop(self.self_attn.merge(attend(q, k, v, self.dropout_p)))

        cross = self.multihead_attn
        q = cross.query(self.norm2(tokens)).expand(batch, -1, -1, -1)
        attended = dense_attention(q, cross.key(memory + position), cross.value(memory), self.dropout_p)
        tokens = tokens + self._drop(cross.merge(attended))
        return tokens + self._drop(self._feed_forward(self.norm3(tokens)))


class Encoder(nn.Module):
    """Encoder layers and a final layer norm."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, feedforward, dropout) for _ in range(layers))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Encode tokens [B, S, C] with positions [S, C]."""
        if takes_fused(self, tokens):
            return encode(self, tokens, position)
        for layer in self.layers:
            tokens = layer(tokens, position)
        return self.norm(tokens)


class Decoder(nn.Module):
    """Decoder layers and a final layer norm."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, feedforward, dropout) for _ in range(layers))

    def forward(self, tokens: Tensor, memory: Tensor, position: Tensor, attend: TokenAttention) -> Tensor:
        """Decode tokens [B or 1, L, C]; see :class:`DecoderLayer`."""
        if takes_fused(self, tokens):
            return decode(self, tokens, memory, position, attend)
        for layer in self.layers:
            tokens = layer(tokens, memory, position, attend)
        return self.norm(tokens)


class Transformer(nn.Module):
    """One stage: an encoder of camera and image tokens, a decoder of joint and vertex tokens.

    All matrices start Xavier-uniform (paper, section 4).
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.encoder = Encoder(width, heads, feedforward, dropout, layers)
        self.decoder = Decoder(width, heads, feedforward, dropout, layers)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, image_tokens: Tensor, camera_token: Tensor, mesh_tokens: Tensor, position: Tensor, attend: TokenAttention
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the stage.

        Args:
            image_tokens: [B, S, C].
            camera_token: [B, 1, C]; joins the encoder in front of the image tokens, without a position.
            mesh_tokens: joint and vertex tokens [B, L, C], or [1, L, C] when the samples share them.
            position: encoding of the image tokens, [S, C].
            attend: the masked self-attention of the decoder.

        Returns:
            camera token [B, 1, C], image tokens [B, S, C], mesh tokens [B, L, C].
        """
        tokens = torch.cat([camera_token, image_tokens], dim=1)
        encoded = self.encoder(tokens, F.pad(position, (0, 0, 1, 0)))
        camera, memory = encoded[:, :1], encoded[:, 1:]
        return camera, memory, self.decoder(mesh_tokens, memory, position, attend)


def fuse_transformer(module: nn.Module, fused: bool = True) -> int:
    """Let the encoders and decoders in a module take, while they train, ops of this project: each residual sum with its
    dropout is one with the layer norm that comes next, and the ReLU one with its dropout, each with the bias of the
    linear layer in front of it (:mod:`fastmetro_kernels.residual_norm`, :mod:`fastmetro_kernels.dropout`); or, with
    ``fused`` false, PyTorch's operations.

    Parameters and their names stay, and so does evaluation; outputs are the same but for rounding and the random
    numbers of the dropout. Copies of the module keep it. What is hooked to single layers, norms and linear layers is
    not called.

    Returns:
        How many layers these encoders and decoders have.
    """
    stages = [stage for stage in module.modules() if isinstance(stage, (Encoder, Decoder))]
    for stage in stages:
        setattr(stage, FUSED, fused)
    return sum(len(stage.layers) for stage in stages)
