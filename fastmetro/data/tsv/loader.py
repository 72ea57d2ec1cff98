"""Batches of TSV rows, read by worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastmetro.data.mixing import Pick
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.dataset import PackedBatch, SkippedRow, TsvDataset, TsvSample
from fastmetro.data.tsv.slots import READ_AHEAD, SlotBatch, Slots, keep_freed_memory


class MixedDataset(Dataset):
    """Several TSV sets behind the picks of a :class:`~fastmetro.data.mixing.MixedSampler`.

    Picks of a source that is None here give no sample: such samples (synthetic images) are made on the device, from the
    same picks (``sampler.picks(step)``).

    Args:
        sets: one per source of the sampler, in its order.

    Raises:
        ValueError: there is no set, or the sets differ in kind, size, pixels, compat, or in being for training.
    """

    def __init__(self, sets: Sequence[TsvDataset | None]) -> None:
        self.sets = list(sets)
        there = [part for part in self.sets if part is not None]
        if not there:
            raise ValueError("sets must hold at least one data set")
        for name in ("kind", "size", "pixels", "compat"):
            values = [getattr(part, name) for part in there]
            if any(value != values[0] for value in values):
                raise ValueError(f"sets must have one {name}, got {values}")
        if any(part.seed is None for part in there):
            raise ValueError("sets must be for training: each needs a seed")
        self._first = there[0]

    def __getitem__(self, pick: Pick) -> TsvSample | SkippedRow:
        part = self.sets[pick.source]
        if part is None:
            raise ValueError(f"source {pick.source} of the pick has no data set here")
        return part[pick]

    def __getitems__(self, picks: Sequence[Pick]) -> list[TsvSample | SkippedRow]:
        """The samples of a batch, set by set. Raises as :meth:`TsvDataset.__getitems__` does."""
        samples: list[TsvSample | SkippedRow] = []
        for number, part in enumerate(self.sets):
            if part is not None:
                samples += part.__getitems__([pick for pick in picks if pick.source == number])
        return samples

    def collate(
        self, items: Sequence[TsvSample | SkippedRow], empty: Callable[..., np.ndarray] = np.empty
    ) -> TsvBatch | PackedBatch:
        """As :meth:`TsvDataset.collate`."""
        return self._first.collate(items, empty)


def make_loader(
    dataset: TsvDataset | MixedDataset,
    batches: Iterable[list[Any]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
    slots: Slots | None = None,
) -> DataLoader:
    """A DataLoader that gives a TsvBatch or PackedBatch per batch of indices; ``batch.to(device)`` is a TsvBatch.

    Args:
        dataset: the rows.
        batches: a :class:`~fastmetro.data.mixing.MixedSampler`, or for evaluation
            ``BatchSampler(range(rank, len(dataset), world_size), batch_size, drop_last=False)``.
        workers: processes; 0 reads in this one.
        pin_memory: have batches in page-locked memory.
        start_method: "fork", "spawn" or "forkserver" of the workers; None for the platform's.
        slots: of these workers. It gives a SlotBatch instead, for :meth:`~fastmetro.data.tsv.slots.Slots.take`; each is
            to be taken before the next one is asked for.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=dataset.collate if slots is None else _Collate(dataset, slots),
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        prefetch_factor=READ_AHEAD if workers else None,
        multiprocessing_context=start_method if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else starting workers would draw from the generator that dropout goes on with
    )


@dataclass(frozen=True)
class _Collate:
    """Writes batches into slots."""

    dataset: TsvDataset | MixedDataset
    slots: Slots

    def __call__(self, items: Sequence[TsvSample | SkippedRow]) -> SlotBatch:
        return self.slots.write(lambda empty: self.dataset.collate(items, empty))


def prepare_worker(worker: int) -> None:
    """OpenCV would start as many threads in each worker as the machine has cores.

    What Ctrl-C and torchrun send to the whole group is for the training: it saves, and ends its workers. So they get
    groups of their own.
    """
    os.setpgid(0, 0)
    cv2.setNumThreads(0)
    keep_freed_memory()
