"""Random numbers that are a pure function of (seed, sample index, name, lane).

Sample ``i`` is the same whatever the batch it is drawn in, the order, the worker or the device, because
there is no generator state: every number is a hash of its own coordinates. The integers are equal on every
device, and so are the uniforms, which are exact multiples of 2**-24; normals agree to float rounding.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant

_MASK = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit finaliser (the one the attention dropout uses) on int64 values in [0, 2**32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


class StreamPlan:
    """Remembers which small draws a program makes, so that later batches hash all of them in one pass.

    A scene takes some 300 draws of a few numbers each, and a draw is some 30 tiny operations: on a GPU, launching
    them would cost more than everything else. The numbers are the same with and without a plan.
    """

    LARGEST = 4096
    """Draws of more numbers per sample are made on their own."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, int], int] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._streams: list[int] = []
        self._lanes: list[int] = []
        self._ranges: dict[tuple[int, torch.device], Tensor] = {}

    def record(self, name: str, count: int) -> None:
        """Have ``count`` numbers of stream ``name`` in the tables from the next batch on."""
        if count > self.LARGEST or (name, count) in self._offsets:
            return
        self._offsets[name, count] = len(self._streams)
        self._streams += [_stream(name)] * count
        self._lanes += range(count)
        self._tables.clear()

    def offset(self, name: str, count: int) -> int | None:
        """Where the draw lies in the tables, or None where it is not planned."""
        return self._offsets.get((name, count))

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Stream words and lanes, int64 [T] each."""
        if device not in self._tables:
            self._tables[device] = (
                torch.tensor(self._streams, dtype=torch.int64, device=device),
                torch.tensor(self._lanes, dtype=torch.int64, device=device),
            )
        return self._tables[device]

    def lanes(self, count: int, device: torch.device) -> Tensor:
        """int64 [count], 0 .. count - 1, the same tensor on every call.

        A compiled program must load its lanes: where it makes them itself, Inductor folds ``arange * constant`` into
        a 32-bit index expression, which the constant of the hash does not fit.
        """
        if (count, device) not in self._ranges:
            self._ranges[count, device] = torch.arange(count, device=device, dtype=torch.int64)
        return self._ranges[count, device]


@assumed_constant  # Dynamo cannot look into zlib
def _stream(name: str) -> int:
    return zlib.crc32(name.encode())


class CounterRandom:
    """Named streams of random numbers for a batch of sample indices.

    Args:
        seed: any integer with 0 <= seed < 2**63.
        indices: int64 [B], the sample indices (>= 0), on the device the numbers are wanted on.
        plan: kept from batch to batch by programs that always make the same draws; see :class:`StreamPlan`.
        planned: the attribute ``planned`` of an instance of the same seed, indices and plan, to hash only once.

    Attributes:
        planned: int64 [B, T], what the plan's draws give, in [0, 2**32); None without a plan.

    Raises:
        TypeError: if ``seed`` is no int or ``indices`` is no int64 tensor.
        ValueError: if ``seed`` is out of range or ``indices`` is not one-dimensional.
    """

    def __init__(
        self, seed: int, indices: Tensor, plan: StreamPlan | None = None, planned: Tensor | None = None
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must satisfy 0 <= seed < 2**63, got {seed}")
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices))}")
        if indices.ndim != 1:
            raise ValueError(f"indices must have shape [B], got {tuple(indices.shape)}")
        self.indices = indices
        low, high = indices & _MASK, (indices >> 32) & _MASK
        # Two 32-bit words of key per sample: with one, a few hundred pairs of a million samples would coincide.
        words = torch.stack([low ^ word for word in (0x9E3779B9, 0x85EBCA6B)])
        self._keys = mix32(mix32(mix32((mix32(words) + (seed & _MASK)) & _MASK) ^ high) ^ (seed >> 32))
        self._plan = plan
        if planned is None and plan is not None:
            planned = self._hash(*plan.tables(indices.device))
        self.planned = planned
        self._units = None if planned is None else (planned >> 8).float() * 2.0**-24

    def _hash(self, stream: Tensor | int, lanes: Tensor) -> Tensor:
        """int64 [B, T]: 32 bits for every lane, of one stream or of one stream each."""
        first, second = mix32(self._keys.unsqueeze(-1) ^ stream).unbind()
        return mix32(mix32((lanes * 0x9E3779B9 + first) & _MASK) ^ second)

    @property
    def batch_size(self) -> int:
        return self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def bits(self, name: str, *shape: int) -> Tensor:
        """int64 [B, *shape] in [0, 2**32). Different names give unrelated numbers."""
        count = math.prod(shape)
        found = self._find(self.planned, name, count)
        if found is None:
            plan = self._plan or StreamPlan()
            found = self._hash(_stream(name), plan.lanes(count, self.device))
        return found.reshape(self.batch_size, *shape)

    def _find(self, table: Tensor | None, name: str, count: int) -> Tensor | None:
        """The columns of a planned draw; None, and a note in the plan, where it is not planned yet."""
        if self._plan is None or table is None:
            return None
        offset = self._plan.offset(name, count)
        if offset is not None and offset + count <= table.shape[1]:
            return table[:, offset : offset + count]
        self._plan.record(name, count)
        return None

    def _unit(self, name: str, *shape: int) -> Tensor:
        """float32 [B, *shape] in [0, 1), multiples of 2**-24."""
        found = self._find(self._units, name, math.prod(shape))
        if found is None:
            return (self.bits(name, *shape) >> 8).float() * 2.0**-24
        return found.reshape(self.batch_size, *shape)

    def uniform(self, name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 [B, *shape] in [low, high)."""
        unit = self._unit(name, *shape)
        return unit if (low, high) == (0.0, 1.0) else low + (high - low) * unit

    def normal(self, name: str, *shape: int) -> Tensor:
        """float32 [B, *shape], standard normal (Box-Muller)."""
        pair = self._unit(name, 2, *shape) + 2.0**-25
        return torch.sqrt(-2.0 * torch.log(pair[:, 0])) * torch.cos(2.0 * math.pi * pair[:, 1])

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        """int64 [B, *shape] in [0, high), for 0 < high <= 2**31."""
        if not 0 < high <= 2**31:
            raise ValueError(f"high must satisfy 0 < high <= 2**31, got {high}")
        return (self.bits(name, *shape) * high) >> 32

    def chance(self, name: str, probability: float, *shape: int) -> Tensor:
        """bool [B, *shape], True with ``probability``."""
        return self.uniform(name, *shape) < probability

    def choice(self, name: str, weights: Sequence[float]) -> Tensor:
        """int64 [B]: which of the alternatives, drawn in proportion to ``weights``."""
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights must be non-negative with a positive sum, got {tuple(weights)}")
        total, bound = float(sum(weights)), 0.0
        unit = self.uniform(name)
        chosen = torch.zeros_like(self.indices)
        for weight in weights[:-1]:  # plain comparisons: no host tensor is copied, so this can be captured
            bound += weight / total
            chosen = chosen + (unit >= bound)
        return chosen
