"""Inputs of the decoder tail, and the same in plain PyTorch."""

from __future__ import annotations

import torch
from fused_cases import DOUBLE, Runner, randn
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.fused import TailWeights

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, TailWeights]


def plain(tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: TailWeights, scale: float | None) -> Tensor:
    """The same in plain PyTorch, in the dtype of tokens."""
    w = weights
    heads, dim = k.shape[2:]
    factor = dim**-0.5 if scale is None else scale
    tokens = tokens + F.linear(attended, w.out_weight, w.out_bias)
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)
    q = F.linear(normed, w.query_weight, w.query_bias).unflatten(-1, (heads, dim))
    scores = torch.einsum("blhd,bshd->bhls", q, k) * factor
    values = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2)
    tokens = tokens + F.linear(values, w.cross_weight, w.cross_bias)
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-3)
    hidden = F.linear(normed, w.expand_weight, w.expand_bias).relu()
    return tokens + F.linear(hidden, w.contract_weight, w.contract_bias)


def exact_and_plain(x: Inputs, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """In float64, and in the dtype of the inputs."""
    weights = TailWeights(*(w.to(DOUBLE) for w in x[4]))
    exact = plain(*(one.to(DOUBLE) for one in x[:4]), weights, scale)
    return exact, plain(*x, scale)


def inputs(runner: Runner, batch: int, tokens: int, keys: int, heads: int, dim: int, hidden: int) -> Inputs:
    """k and v are slices of one wide projection."""
    width = heads * dim
    k, v = randn(runner, batch, keys, 2, heads, dim, seed=1).unbind(2)
    sizes = [(width, width)] * 3 + [(hidden, width), (width, hidden)]
    weights: list[Tensor] = []
    for number, (features, inner) in enumerate(sizes):
        weights += [
            randn(runner, features, inner, seed=2 + number) * max(inner, 1) ** -0.5,
            randn(runner, features, seed=9 + number),
        ]
    stream = 2 * randn(runner, batch, tokens, width) + 1
    return stream, randn(runner, batch, tokens, width, seed=8), k, v, TailWeights(*weights)
