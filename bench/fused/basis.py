"""What all cases have in common: the names of contenders, random numbers, and what a GPU reaches at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Run = Callable[..., Tensor]

BYTES_PER_SECOND = 4.2e12
FLOPS_PER_SECOND = {2: 790e12, 4: 67e12}
"""What an H200 reaches, by bytes per element: tensor cores as measured, float32 as its data sheet says."""

LIBRARY, COMPILED, OURS = "library", "compiled", "ours"
LATE, SEPARATE = "ours, weights after the wait", "ours, separate launches"
NAMED = (LIBRARY, COMPILED, OURS, LATE, SEPARATE)
"""Contenders that are no tiles."""

EPSILON = 1e-5


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normally distributed, on the device of the generator."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def floor(elements: int, flops: int, dtype: torch.dtype) -> float:
    """Seconds that moving so many numbers of this dtype or multiplying takes at least."""
    return max(elements * dtype.itemsize / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND[dtype.itemsize])


def tile_name(tile: tuple[int, ...]) -> str:
    """Its numbers with an x between them."""
    return "x".join(map(str, tile))


def native_name(tile: tuple[int, ...]) -> str:
    """Of a tile of the native kernel, without whether it starts early."""
    return f"native {tile_name(tile[:3])}"


@dataclass(frozen=True)
class Rows:
    """A case whose only activation is x."""

    tokens: int
    width: int
    batch: int
    dtype: torch.dtype
    activation_count: ClassVar[int] = 1

    @property
    def shape(self) -> str:
        """M x K."""
        return f"{self.batch}*{self.tokens} x {self.width}"

    def activations(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """x [B, M, K]."""
        return (randn(generator, self.dtype, self.batch, self.tokens, self.width),)
