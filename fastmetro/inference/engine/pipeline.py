"""A stream of batches through an engine: while one is computed, the next is read and copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Outputs = dict[str, Tensor]


class _Engine(Protocol):
    batch_size: int
    device: torch.device

    def __call__(self, images: Tensor) -> Outputs: ...


class _Slot:
    """Room for a batch on the host and on the device, and for its outputs on the host."""

    def __init__(self, like: Tensor, count: int, device: torch.device) -> None:
        shape = (count, *like.shape[1:])
        self.host = torch.empty(shape, dtype=like.dtype, pin_memory=True)
        self.device = torch.zeros(shape, dtype=like.dtype, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()


def overlap(engine: _Engine, batches: Iterable[Tensor | np.ndarray], to_host: bool) -> Iterator[Outputs]:
    """See ``Engine.stream``."""
    tensors = _checked(map(torch.as_tensor, batches), engine.batch_size)
    if engine.device.type == "cuda":
        yield from _overlap_cuda(engine, tensors, to_host)
    else:
        yield from map(engine, tensors)


def _checked(batches: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    first: Tensor | None = None
    for number, batch in enumerate(batches):
        first = batch if first is None else first
        if batch.dtype != first.dtype or batch.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"batches: number {number} is {batch.dtype} {list(batch.shape)}, the first was {first.dtype} "
                f"{list(first.shape)}; they may differ in their number of images only"
            )
        if not 0 < len(batch) <= most:
            raise ValueError(f"batches: number {number} has {len(batch)} images; the engine takes 1 to {most}")
        yield batch


def _overlap_cuda(engine: _Engine, batches: Iterator[Tensor], to_host: bool) -> Iterator[Outputs]:
    """Two slots in turn. A batch with fewer images is computed as a full one, so that no other graph is needed."""
    copies = torch.cuda.Stream(engine.device)
    slots: list[_Slot] = []
    waiting: Callable[[], Outputs] | None = None
    for number, batch in enumerate(batches):
        if len(slots) < 2:
            slots.append(_Slot(batch, engine.batch_size, engine.device))
            copies.wait_stream(torch.cuda.current_stream(engine.device))  # the slot was filled with zeros there
        slot = slots[number % 2]
        slot.used.synchronize()  # the batch before the last has been computed
        count = len(batch)
        if batch.device.type == "cpu":
            slot.host[:count].copy_(batch)
            with torch.cuda.stream(copies):
                slot.device[:count].copy_(slot.host[:count], non_blocking=True)
                slot.copied.record(copies)
            torch.cuda.current_stream(engine.device).wait_event(slot.copied)
        else:
            slot.device[:count].copy_(batch, non_blocking=True)
        outputs = {name: value[:count] for name, value in engine(slot.device).items()}
        slot.used.record(torch.cuda.current_stream(engine.device))
        made = _to_host(outputs) if to_host else (lambda outputs=outputs: outputs)
        if waiting is not None:
            yield waiting()
        waiting = made
    if waiting is not None:
        yield waiting()


def _to_host(outputs: Outputs) -> Callable[[], Outputs]:
    """Starts copies to pinned memory; the result waits for them."""
    host = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for name, value in outputs.items()}
    for name, value in outputs.items():
        host[name].copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def finish() -> Outputs:
        arrived.synchronize()
        return host

    return finish
