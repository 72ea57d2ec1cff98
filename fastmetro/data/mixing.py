"""Which samples a training step sees, from several sources: a pure function of (seed, step).

The samples of a training are numbered. They are dealt in blocks: each block of ``BLOCK`` samples holds a fixed count
of each source, in an order that is a hash of (seed, block). The samples of a source are numbered in turn; their numbers
run through epochs, each a permutation of all rows that is a hash of (seed, source, epoch). So nothing depends on how
many processes there are or on what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from fastmetro.data.counter_random import CounterRandom

BLOCK = 8192
"""Samples among which the shares hold, rounded to whole samples."""


class Pick(NamedTuple):
    """A sample of a training.

    Attributes:
        source: which source it is of.
        row: of the source; of an endless source, how many of its samples come before in the order of the training.
        number: of the sample, unlike that of every other sample of the training.
    """

    source: int
    row: int
    number: int


@dataclass(frozen=True)
class Source:
    """A source of a mixture.

    Attributes:
        share: of all samples, in proportion to the other shares; positive.
        length: how many rows it has; None where it is endless (synthetic images).
    """

    share: float
    length: int | None = None


class MixedSampler(Sampler[list[Pick]]):
    """Batches of picks from several sources; a `batch_sampler` for a DataLoader.

    Within an epoch of a source each row is picked once, by one rank. A resumed training passes the step at which it
    goes on as ``start_step``; also with another number of ranks, every step has the samples that it would have had.

    Args:
        sources: what is mixed.
        batch_size: samples of a step, of all ranks together; divisible by ``world_size``.
        seed: 0 <= seed < 2**63.
        steps: where the training ends; None for never.
        start_step: where it begins.
        rank: which part of each step is given; samples rank * n to (rank + 1) * n, n = batch_size / world_size.
        world_size: how many ranks there are.

    Raises:
        ValueError: an argument is not one of those accepted.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        seed: int,
        *,
        steps: int | None = None,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sources(sources)
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of world_size, got {batch_size} and {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must satisfy 0 <= rank < {world_size}, got {rank}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must satisfy 0 <= seed < 2**63, got {seed}")
        if start_step < 0 or (steps is not None and steps < start_step):
            raise ValueError(f"start_step must satisfy 0 <= start_step <= steps ({steps}), got {start_step}")
        self.sources, self.batch_size, self.seed = list(sources), batch_size, seed
        self.steps, self.start_step, self.rank, self.world_size = steps, start_step, rank, world_size
        self._counts = _counts([source.share for source in sources])
        self._blocks: dict[int, np.ndarray] = {}
        self._epochs: list[dict[int, np.ndarray]] = [{} for _ in sources]

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("a sampler without steps has no length")
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[Pick]]:
        step = self.start_step
        while self.steps is None or step < self.steps:
            yield self.picks(step)
            step += 1

    def picks(self, step: int) -> list[Pick]:
        """This rank's samples of a step, batch_size / world_size of them.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        count = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * count
        return [self._pick(number) for number in range(first, first + count)]

    def _pick(self, number: int) -> Pick:
        block, place = divmod(number, BLOCK)
        source, earlier = _kept(self._blocks, block, lambda: self._deal(block))[place].tolist()
        turn = block * int(self._counts[source]) + earlier
        length = self.sources[source].length
        if length is None:
            return Pick(source, turn, number)
        epoch, place = divmod(turn, length)
        order = _kept(self._epochs[source], epoch, lambda: self._permutation(f"source {source}, epoch", epoch, length))
        return Pick(source, int(order[place]), number)

    def _deal(self, block: int) -> np.ndarray:
        """int64 [BLOCK, 2], for each sample its source and how many of that source come before it in the block."""
        sources = np.repeat(np.arange(len(self.sources)), self._counts)[self._permutation("block", block, BLOCK)]
        earlier = np.empty_like(sources)
        for source, count in enumerate(self._counts):
            earlier[sources == source] = np.arange(count)
        return np.stack([sources, earlier], axis=1)

    def _permutation(self, name: str, index: int, count: int) -> np.ndarray:
        """int64 [count], a permutation that is a hash of (seed, name, index).

        Sorting hashes gives the same order with every version of every library, unlike their shuffles.
        """
        bits = CounterRandom(self.seed, torch.arange(count)).bits(f"{name} {index}")
        return torch.argsort(bits, stable=True).numpy()


def _kept(table: dict[int, np.ndarray], key: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The entry, made where it is missing; the two latest are kept, because steps lie across borders."""
    if key not in table:
        while len(table) > 1:
            del table[next(iter(table))]
        table[key] = make()
    return table[key]


def _counts(shares: Sequence[float]) -> np.ndarray:
    """int64, how many samples of a block each source has: rounded by largest remainders, at least 1."""
    exact = np.array(shares, np.float64) / sum(shares) * BLOCK
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while counts.sum() != BLOCK:
        missing = exact - counts
        if counts.sum() < BLOCK:
            counts[int(missing.argmax())] += 1
        else:
            counts[int(np.where(counts > 1, missing, np.inf).argmin())] -= 1
    return counts


def _check_sources(sources: Sequence[Source]) -> None:
    if not 1 <= len(sources) <= BLOCK:
        raise ValueError(f"sources must be 1 to {BLOCK} sources, got {len(sources)}")
    for number, source in enumerate(sources):
        if not (source.share > 0 and np.isfinite(source.share)):
            raise ValueError(f"sources[{number}].share must be positive and finite, got {source.share}")
        if source.length is not None and not 1 <= source.length < 2**31:
            raise ValueError(f"sources[{number}].length must be 1 to 2**31 - 1 or None, got {source.length}")
