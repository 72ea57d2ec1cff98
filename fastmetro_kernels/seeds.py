"""Probabilities and seeds of dropouts: what the ops that drop take, and seeds that are drawn on the device."""

from __future__ import annotations

import torch
from torch import Tensor


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
