"""Which elements a dropout keeps: counter-based random numbers, the same on every backend and in every pass.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes 128 bits of
a counter of 128 bits and a key of 64, the seed. Eight elements next to one another share a call: element ``8 g + j``
has bits ``16 (j % 2)`` to ``16 (j % 2) + 15`` of word ``j // 2`` of the counter ``(g, row, 0, 0)``, and is kept where
they are at least :func:`threshold`. So a backward pass finds the mask again that the forward pass used, and no number
costs more than an eighth of a call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 8
"""Elements that share a call."""
STEPS = 65536
"""Probabilities are multiples of one over this."""
_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def threshold(dropout_p: float) -> int:
    """The 16-bit number below which an element is dropped: dropout_p * 65536 rounded, at most 65535."""
    return min(math.floor(dropout_p * STEPS + 0.5), STEPS - 1)


def scale_of_kept(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p) of the probability p that :func:`threshold` stands for."""
    return STEPS / (STEPS - threshold(dropout_p))


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of uint32 numbers held in int64, by halves so that nothing overflows."""
    upper = x * (constant >> 16)
    lower = x * (constant & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & _LOW32


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of uint32 numbers held in int64 that broadcast; key: int64, one number, all of its bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW32, (key >> 32) & _LOW32
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW32, (k1 + _KEY_STEPS[1]) & _LOW32
    return c0, c1, c2, c3


def kept(seed: Tensor, rows: int, width: int, dropout_p: float) -> Tensor:
    """Which elements of ``[rows, width]`` stay: boolean.

    One long row goes on in the counter's second word, as if its groups were numbered with 64 bits.
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    group = torch.arange(-(-width // GROUP), device=seed.device)[None, :]
    row, group = torch.broadcast_tensors(row + (group >> 32), group & _LOW32)
    words = philox(seed.reshape(()), (group, row, torch.zeros_like(row), torch.zeros_like(row)))
    halves = [part for word in words for part in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(1)[:, :width] >= threshold(dropout_p)
