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


def check_probability(name: str, value: object) -> None:
    """A number in [0, 1).

    Raises:
        TypeError: no number.
        ValueError: another one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed, int64 [1] on the device, made without synchronising; None when nothing is dropped.

    Args:
        seed: any integer of 64 bits, an int64 tensor of one element on the device, or None to draw one from PyTorch's
            generator.
        dropout_p: that of the dropout.
        device: where it is used.

    Raises:
        TypeError: a seed of another type or dtype.
        ValueError: one of another size, on another device or of more than 64 bits.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be int64, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {list(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on {device}, got {seed.device}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def draw_seeds(count: int, device: torch.device) -> list[Tensor]:
    """So many seeds of PyTorch's generator by one launch, each at an address that is a multiple of 16."""
    return list(torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, device=device)[:, :1].unbind())


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
