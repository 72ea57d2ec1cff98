"""How batches come from worker processes: written once, into memory that both share and a GPU can copy from.

A DataLoader sends each tensor of a batch in shared memory of its own, new for every batch, and copies it once more into
page-locked memory. At some megabytes a batch that takes longer than a training step. Here every worker has a few slots
in one piece of memory, which it fills in turn, and a batch is one copy to the device.

A worker waits for its next slot. With as many as batches that it may have read ahead and one more it never waits for
long: the batch that lay there was taken two of its batches ago, and taking the next one, of any worker, gave it back.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

READ_AHEAD = 2
"""Batches that a worker reads ahead; a DataLoader's default."""
_ALIGNMENT = 64
_PATIENCE = 5.0
"""Seconds after which a worker that waits looks whether there still is somebody to wait for."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a slot, in bytes from its beginning."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SlotBatch:
    """A batch as it is sent.

    Attributes:
        content: the batch, a dataclass, with places instead of tensors; with the tensors that did not fit.
        slot: its number.
        used: bytes of the slot.
    """

    content: Any
    slot: int
    used: int


class Slots:
    """Memory for batches of worker processes, shared by all of them.

    Args:
        workers: how many processes.
        size: bytes of a slot. What does not fit into a slot is sent as a DataLoader does it.
        start_method: of the workers, as for a DataLoader.

    Raises:
        OSError: there is no such memory.
        ValueError: there are no workers.
    """

    def __init__(self, workers: int, size: int, start_method: str | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._count = READ_AHEAD + 1
        self._file = os.memfd_create("fastmetro batches")  # /dev/shm is often too small
        os.ftruncate(self._file, workers * self._count * self.size)
        self._close = weakref.finalize(self, os.close, self._file)
        self._map()
        context = multiprocessing.get_context(start_method)
        self._free = [context.Semaphore(self._count) for _ in range(workers)]
        self._turn = 0
        self._taken: tuple[int, torch.cuda.Event | None] | None = None

    @staticmethod
    def exist() -> bool:
        """Whether the operating system has such memory."""
        return hasattr(os, "memfd_create")

    def _map(self) -> None:
        self._memory = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are spawned."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_memory", "_close", "_taken")}
        return kept | {"_file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_file": state["_file"].detach(), "_taken": None})
        self._map()

    def lock_pages(self) -> None:
        """Let a GPU copy from this memory while the host goes on; without it copies are right, and slower."""
        place = self._memory.ctypes.data
        if torch.cuda.cudart().cudaHostRegister(place, self._memory.nbytes, 0) != torch.cuda.cudart().cudaError.success:
            warnings.warn(f"{self._memory.nbytes} bytes cannot be page-locked", RuntimeWarning, stacklevel=2)
            return
        # Not while its pages can still be seen: the array goes after this.
        weakref.finalize(self, _unlock, self._memory)

    def write(self, make: Callable[[Callable[..., np.ndarray]], Any]) -> SlotBatch:
        """In a worker: the batch that ``make`` makes, in the next slot.

        Args:
            make: is given what to make large arrays with, as with ``np.empty``.
        """
        worker = get_worker_info()
        assert worker is not None
        parent = multiprocessing.parent_process()
        while not self._free[worker.id].acquire(timeout=_PATIENCE):
            if parent is None or not parent.is_alive():
                raise RuntimeError("the process that takes the batches is gone")
        slot = worker.id * self._count + self._turn
        try:
            writer = _Writer(self._slot(slot))
            content = _mapped(make(writer.empty), writer.place)
        except BaseException:
            self._free[worker.id].release()
            raise
        self._turn = (self._turn + 1) % self._count
        return SlotBatch(content, slot, writer.used)

    def take(self, batch: SlotBatch, device: torch.device) -> Any:
        """The batch on a device. It frees the slot of the batch that was taken before."""
        self._give_back()
        memory = torch.from_numpy(self._slot(batch.slot)[: batch.used])
        copy = memory.to(device, non_blocking=True, copy=True)
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._taken = batch.slot, event

        def found(value: Any) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            end = value.offset + math.prod(value.shape) * value.dtype.itemsize
            return copy[value.offset : end].view(value.dtype).view(value.shape)

        return _mapped(batch.content, found)

    def _give_back(self) -> None:
        if self._taken is None:
            return
        slot, event = self._taken
        if event is not None:
            event.synchronize()
        self._free[slot // self._count].release()
        self._taken = None

    def _slot(self, number: int) -> np.ndarray:
        return self._memory[number * self.size : (number + 1) * self.size]


class _Writer:
    """Puts arrays into a slot, one behind the other."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory, self.used = memory, 0

    def empty(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray:
        """As ``np.empty``, in the slot while there is room."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        start = -(-self.used // _ALIGNMENT) * _ALIGNMENT
        end = start + math.prod(sizes) * np.dtype(dtype).itemsize
        if end > len(self._memory):
            return np.empty(sizes, dtype)
        self.used = end
        return self._memory[start:end].view(dtype).reshape(sizes)

    def place(self, tensor: Tensor) -> Place | Tensor:
        """Where a tensor lies; it is copied into the slot unless it is there. The tensor where there is no room."""
        bytes_ = tensor.numel() * tensor.element_size()
        offset = tensor.data_ptr() - self._memory.ctypes.data
        if not bytes_ or not (0 <= offset <= len(self._memory) - bytes_):
            array = tensor.numpy()
            copy = self.empty(array.shape, array.dtype)
            offset = copy.ctypes.data - self._memory.ctypes.data
            if bytes_ and not 0 <= offset <= len(self._memory) - bytes_:
                return tensor
            copy[...] = array
            offset = offset if bytes_ else 0
        return Place(offset, tensor.dtype, tuple(tensor.shape))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass with every tensor and place in it, and in dataclasses in it, changed."""
    if isinstance(value, Tensor | Place):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        kinds = (Tensor, Place)
        changed = {
            name: _mapped(part, change) for name, part in inner.items() if isinstance(part, kinds) or is_dataclass(part)
        }
        return replace(value, **changed)
    return value


def _unlock(memory: np.ndarray) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed: the pages of every image would be asked for anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # of glibc, and of nobody else
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
