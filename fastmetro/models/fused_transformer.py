"""The layers of the transformer in training by this project's ops: each residual sum with its dropout is taken together
with the layer norm that comes next, also that of the next layer, and the ReLU with the dropout behind it. The bias of
the linear layer in front of each is theirs, too: its gradient then needs no kernel that reads all of one once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmetro.models.attention import MultiheadAttention, TokenAttention, dense_attention
from fastmetro.models.matrices import matrix_of
from fastmetro_kernels.dropout import relu_dropout
from fastmetro_kernels.residual_norm import final_residual_norm, residual_norm
from fastmetro_kernels.seeds import draw_seeds

if TYPE_CHECKING:
    from fastmetro.models.transformer import Decoder, Encoder, _Layer

FUSED = "fused_in_training"
_SUMS = {"encoder": 2, "decoder": 3}


def takes_fused(stage: Encoder | Decoder, tokens: Tensor) -> bool:
    """Whether an encoder or decoder trains with the ops: it was asked to, and its norms and biases are what they
    take."""
    if not (stage.training and getattr(stage, FUSED, False) and len(stage.layers) > 0):
        return False
    wide = torch.promote_types(tokens.dtype, torch.float32)
    norms = [layer for layer in stage.modules() if isinstance(layer, nn.LayerNorm)]
    linears = [layer for layer in stage.modules() if isinstance(layer, nn.Linear)]
    vectors = [vector for norm in norms for vector in (norm.weight, norm.bias)] + [linear.bias for linear in linears]
    return all(vector is not None and vector.dtype == wide for vector in vectors)


class _Seeds:
    """Of the dropouts of one stage in one pass, drawn together: a launch for all of them."""

    def __init__(self, layers: Sequence[_Layer], sums: int, device: torch.device) -> None:
        count = (sums + 1) * sum(layer.dropout_p > 0.0 for layer in layers)
        self._left = draw_seeds(count, device) if count else []

    def next(self, dropout_p: float) -> Tensor | None:
        """Of one dropout; None where nothing is dropped."""
        return self._left.pop() if dropout_p > 0.0 else None


def _plain_norm(norm: nn.LayerNorm, tokens: Tensor, narrow: bool) -> Tensor:
    """The norm in front of the first layer."""
    dtype = _dtype_of_norm(tokens, tokens.dtype, narrow)
    return final_residual_norm(tokens, None, norm.weight, norm.bias, epsilon=norm.eps, dtype=dtype)


class _Branch(NamedTuple):
    """What a layer adds to the tokens: the result of a linear layer without its bias, and the bias."""

    result: Tensor
    bias: Tensor


def _add_and_norm(
    tokens: Tensor, branch: _Branch, norm: nn.LayerNorm, layer: _Layer, seeds: _Seeds, narrow: bool
) -> tuple[Tensor, Tensor]:
    """The tokens with what a layer adds to them, and the norm of these."""
    dtype = _dtype_of_norm(tokens, torch.promote_types(tokens.dtype, branch.result.dtype), narrow)
    p = layer.dropout_p
    return residual_norm(
        tokens, branch.result, norm.weight, norm.bias, branch_bias=branch.bias, dropout_p=p, seed=seeds.next(p),
        epsilon=norm.eps, dtype=dtype,
    )  # fmt: skip


def _add_and_end(tokens: Tensor, branch: _Branch, norm: nn.LayerNorm, layer: _Layer, seeds: _Seeds) -> Tensor:
    """The norm alone, as behind the last layer."""
    dtype = _dtype_of_norm(tokens, torch.promote_types(tokens.dtype, branch.result.dtype), False)
    p = layer.dropout_p
    return final_residual_norm(
        tokens, branch.result, norm.weight, norm.bias, branch_bias=branch.bias, dropout_p=p, seed=seeds.next(p),
        epsilon=norm.eps, dtype=dtype,
    )  # fmt: skip


def _dtype_of_norm(tokens: Tensor, dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Of a norm of this dtype; narrow: only linear layers take it.

    Under autocast PyTorch's layer norm is float32, but on a CPU, and linear layers round what they take: the op does so
    for them.
    """
    device = tokens.device.type
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    if narrow:
        return torch.get_autocast_dtype(device)
    return dtype if device == "cpu" else torch.float32


def _merged(attention: MultiheadAttention, attended: Tensor) -> _Branch:
    return _Branch(attention.merge_without_bias(attended), attention.out_proj.bias)


def _feed_forward(layer: _Layer, x: Tensor, seeds: _Seeds) -> _Branch:
    p = layer.dropout_p
    hidden = F.linear(x, matrix_of(layer.linear1, layer.linear1.weight))
    hidden = relu_dropout(hidden, p, bias=layer.linear1.bias, seed=seeds.next(p))
    return _Branch(F.linear(hidden, matrix_of(layer.linear2, layer.linear2.weight)), layer.linear2.bias)


def encode(encoder: Encoder, tokens: Tensor, position: Tensor) -> Tensor:
    """``Encoder.forward``. The first norm of a layer is as wide as PyTorch's: the position is added to it."""
    layers: list[Any] = list(encoder.layers)
    seeds = _Seeds(layers, _SUMS["encoder"], tokens.device)
    following = [layer.norm1 for layer in layers[1:]]
    x = _plain_norm(layers[0].norm1, tokens, narrow=False)
    for place, layer in enumerate(layers):
        q, k = layer.self_attn.query_key(x + position)
        attended = dense_attention(q, k, layer.self_attn.value(x), layer.dropout_p)
        merged = _merged(layer.self_attn, attended)
        tokens, x = _add_and_norm(tokens, merged, layer.norm2, layer, seeds, narrow=True)
        fed = _feed_forward(layer, x, seeds)
        if place < len(following):
            tokens, x = _add_and_norm(tokens, fed, following[place], layer, seeds, narrow=False)
    return _add_and_end(tokens, fed, encoder.norm, layer, seeds)


def decode(decoder: Decoder, tokens: Tensor, memory: Tensor, position: Tensor, attend: TokenAttention) -> Tensor:
    """``Decoder.forward``. All norms but the last are taken by linear layers alone."""
    layers: list[Any] = list(decoder.layers)
    seeds = _Seeds(layers, _SUMS["decoder"], tokens.device)
    following = [layer.norm1 for layer in layers[1:]]
    batch = memory.shape[0]
    x = _plain_norm(layers[0].norm1, tokens, narrow=True)
    for place, layer in enumerate(layers):
        q, k, v = layer.self_attn.query_key_value(x)
        if layer.dropout_p > 0.0:  # dropout differs between samples
            q, k, v = (one.expand(batch, -1, -1, -1) for one in (q, k, v))
        merged = _merged(layer.self_attn, attend(q, k, v, layer.dropout_p))
        tokens, x = _add_and_norm(tokens, merged, layer.norm2, layer, seeds, narrow=True)

        cross = layer.multihead_attn
        q = cross.query(x).expand(batch, -1, -1, -1)
        attended = dense_attention(q, cross.key(memory + position), cross.value(memory), layer.dropout_p)
        tokens, x = _add_and_norm(tokens, _merged(cross, attended), layer.norm3, layer, seeds, narrow=True)
        fed = _feed_forward(layer, x, seeds)
        if place < len(following):
            tokens, x = _add_and_norm(tokens, fed, following[place], layer, seeds, narrow=True)
    return _add_and_end(tokens, fed, decoder.norm, layer, seeds)
