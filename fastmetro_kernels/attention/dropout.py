"""Dropout on attention weights: a counter-based mask, the same on every backend and in every pass.

Whether the weight of (batch, head, query token, key token) is kept depends on these four numbers and the seed
alone: Philox2x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the tokens as
counter and a key hashed from the seed and batch * heads + head. A forward by rows and a backward by columns
therefore agree, and so do the C++, CUDA and Triton kernels, which repeat this arithmetic in uint32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF
_PHILOX_MULTIPLIER = 0xD256D193
_PHILOX_STEP = 0x9E3779B9
_ROUNDS = 7


def threshold(dropout_p: float) -> int:
    """The 32-bit random number below which a weight is dropped: floor(dropout_p * 2^32)."""
    return math.floor(dropout_p * 2.0**32)


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of uint32 numbers held in int64, by halves so that nothing overflows."""
    upper = x * (constant >> 16)
    lower = x * (constant & 0xFFFF)
    low = (lower + ((upper & 0xFFFF) << 16)) & _LOW32
    return (upper + (lower >> 16)) >> 16, low


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche (a bijection of uint32)."""
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)[1]
    x = _multiply(x ^ (x >> 15), 0x846CA68B)[1]
    return x ^ (x >> 16)


def random_bits(seed: Tensor, batch_heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Random 32-bit numbers in int64 for broadcast (batch * heads + head, query token, key token).

    Args:
        seed: int64, one element, any value.
        batch_heads, queries, keys: int64, broadcast against each other.
    """
    seed = seed.reshape(())
    key = _mix((_mix(batch_heads ^ (seed & _LOW32)) + ((seed >> 32) & _LOW32)) & _LOW32)
    x0, x1 = keys, queries
    for _ in range(_ROUNDS):
        high, low = _multiply(x0, _PHILOX_MULTIPLIER)
        x0, x1 = high ^ key ^ x1, low
        key = (key + _PHILOX_STEP) & _LOW32
    return x0


def dropped(weights: Tensor, seed: Tensor | None, dropout_p: float, queries: Tensor, keys: Tensor) -> Tensor:
    """`weights` [B, H, ...] with dropout applied: kept ones are divided by (1 - dropout_p).

    Args:
        weights: [B, H, ...].
        seed: int64, one element; not used when `dropout_p` is 0.
        dropout_p: Probability of dropping, in [0, 1).
        queries, keys: int64 token numbers (hubs first), broadcastable to `weights.shape[2:]`.
    """
    if dropout_p == 0.0 or seed is None:
        return weights
    batch, heads = weights.shape[:2]
    batch_heads = torch.arange(batch * heads, device=weights.device)
    batch_heads = batch_heads.view(batch, heads, *[1] * (weights.dim() - 2))
    keep = random_bits(seed, batch_heads, queries, keys) >= threshold(dropout_p)
    return weights * keep / (1.0 - dropout_p)
