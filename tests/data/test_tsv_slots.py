"""Batches that workers write into memory they share with the process that trains."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tsv_cases import assert_equal, good, write_set

from fastmetro.data.mixing import MixedSampler, Source
from fastmetro.data.tsv import TsvSource
from fastmetro.data.tsv import slots as slots_module
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.data.tsv.loader import MixedDataset, make_loader
from fastmetro.data.tsv.slots import READ_AHEAD, Place, SlotBatch, Slots

pytestmark = pytest.mark.skipif(not Slots.exist(), reason="this system has no memory files")
SIZE, BATCH = 32, 8
CPU = torch.device("cpu")


def taken(loader: Any, slots: Slots, device: torch.device = CPU) -> Iterator[Any]:
    for batch in loader:
        assert isinstance(batch, SlotBatch)
        yield slots.take(batch, device).to(device)


def dataset(folder: Path, pixels: Any) -> TsvDataset:
    return TsvDataset(TsvSource(write_set(folder, good(20))), "body", size=SIZE, seed=3, pixels=pixels)


@pytest.mark.parametrize(
    ("method", "pixels", "size"),
    [("fork", "worker", 1 << 20), ("fork", "device", 1 << 20), ("fork", "worker", 1 << 14), ("fork", "device", 1 << 12),
     ("spawn", "device", 1 << 20)],
)  # fmt: skip
def test_the_same_batches(tmp_path: Path, method: str, pixels: str, size: int, device: torch.device) -> None:
    """Many more than there are slots, in the small ones of which not everything has room."""
    data = dataset(tmp_path, pixels)
    sampler = MixedSampler([Source(1, len(data))], BATCH, seed=6, steps=17)
    slots = Slots(2, size, method)
    if device.type == "cuda":
        slots.lock_pages()
    loader = make_loader(data, sampler, workers=2, start_method=method, slots=slots)
    found = list(taken(loader, slots, device))  # all at once: none may lie in memory that is written again
    expected = [batch.to("cpu") for batch in make_loader(data, sampler)]
    assert len(found) == len(expected) == 17
    for actual, one in zip(found, expected, strict=True):
        assert actual.images.device.type == device.type
        assert_equal(actual, one, 0.02 if device.type == "cuda" else 0.0)


def test_a_batch_without_samples(tmp_path: Path) -> None:
    mixed = MixedDataset([dataset(tmp_path, "worker"), None])
    slots = Slots(1, 1 << 20)
    (batch,) = taken(make_loader(mixed, [[]], workers=1, slots=slots), slots)
    assert batch.images.shape == (0, 3, SIZE, SIZE) and batch.pose.shape == (0, 72) and batch.keys == []


def test_what_is_sent_is_small(tmp_path: Path) -> None:
    data = dataset(tmp_path, "device")
    slots = Slots(1, 1 << 20)
    (batch,) = make_loader(data, [list(range(8))], workers=1, slots=slots)
    places = [batch.content.labels.pose, batch.content.cuts.pixels, batch.content.cuts.geometry]
    assert all(isinstance(place, Place) and place.offset % 64 == 0 for place in places)
    assert len({place.offset for place in places}) == 3 and max(place.offset for place in places) < batch.used


class Worker(NamedTuple):
    id: int


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a worker, and so is not asked for long."""
    monkeypatch.setattr(slots_module, "get_worker_info", lambda: Worker(1))
    monkeypatch.setattr(slots_module, "_PATIENCE", 0.01)


def free(slots: Slots) -> list[int]:
    return [semaphore.get_value() for semaphore in slots._free]


@pytest.mark.usefixtures("worker")
def test_a_slot_is_free_again_when_the_next_batch_is_taken() -> None:
    slots = Slots(2, 4096)
    every = READ_AHEAD + 1
    batches = [slots.write(lambda empty: torch.zeros(3)) for _ in range(every)]
    assert [batch.slot for batch in batches] == [every, every + 1, every + 2] and free(slots) == [every, 0]
    slots.take(batches[0], CPU)
    assert free(slots) == [every, 0]
    slots.take(batches[1], CPU)
    assert free(slots) == [every, 1]
    assert slots.write(lambda empty: torch.zeros(3)).slot == every


@pytest.mark.usefixtures("worker")
def test_a_batch_that_cannot_be_made_takes_no_slot() -> None:
    slots = Slots(2, 4096)
    with pytest.raises(KeyError):
        slots.write(lambda empty: {}["nothing"])
    assert free(slots)[1] == READ_AHEAD + 1 and slots.write(lambda empty: torch.zeros(3)).slot == READ_AHEAD + 1


class Gone:
    def is_alive(self) -> bool:
        return False


@pytest.mark.usefixtures("worker")
def test_a_worker_does_not_wait_for_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(2, 4096)
    monkeypatch.setattr(multiprocessing, "parent_process", Gone)
    for _ in range(READ_AHEAD + 1):
        slots.write(lambda empty: torch.zeros(3))
    with pytest.raises(RuntimeError, match="the process that takes the batches is gone"):
        slots.write(lambda empty: torch.zeros(3))


@pytest.mark.usefixtures("worker")
def test_arrays_of_a_slot_are_aligned_and_apart() -> None:
    slots = Slots(2, 4096)
    kept: list[np.ndarray] = []

    def make(empty: Any) -> torch.Tensor:
        kept.extend([empty(5, np.uint8), empty((2, 3), np.float64), empty(4096, np.uint8)])
        return torch.from_numpy(kept[1])

    batch = slots.write(make)
    assert batch.content == Place(64, torch.float64, (2, 3)) and batch.used == 64 + 48
    assert kept[1].ctypes.data - kept[0].ctypes.data == 64
    assert abs(kept[2].ctypes.data - kept[0].ctypes.data) >= 4096  # no room: elsewhere


def test_errors() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Slots(0, 4096)
