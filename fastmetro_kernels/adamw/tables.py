"""Tables of addresses that the kernels read, and how they get to the device."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmetro_kernels.adamw.plan import chunks

RING = 4
"""Buffers of the host from which copies may be under way: the host waits for the oldest."""


class Tables:
    """What one caller keeps between calls: chunks of tensors by their sizes, and buffers of the host.

    Addresses of gradients differ from step to step, so their table is copied to the device in each of them, from pinned
    memory and without waiting. A copy that is captured in a CUDA graph is made anew by each replay: its buffer is never
    used for anything else, and the graph must not be replayed when this object is gone.
    """

    def __init__(self) -> None:
        self._chunks: dict[tuple[torch.device, int, tuple[int, ...]], Tensor] = {}
        self._ring: collections.deque[tuple[Tensor, torch.cuda.Event]] = collections.deque()
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def chunks(self, sizes: Sequence[int], chunk: int, device: torch.device) -> Tensor:
        """int64 on the device; see :func:`fastmetro_kernels.adamw.plan.chunks`.

        Raises:
            RuntimeError: a CUDA graph is being captured, and there has been no call with such sizes before.
        """
        key = device, chunk, tuple(sizes)
        found = self._chunks.get(key)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph is being captured, and no step was made with these tensors before: make one first, "
                    "with the same Tables"
                )
            found = self._chunks[key] = torch.from_numpy(chunks(sizes, chunk)).to(device)
        return found

    def upload(self, values: NDArray[np.int64], device: torch.device) -> Tensor:
        """Such a table on the device, in the order of the current stream."""
        given = torch.from_numpy(values)
        if device.type != "cuda":
            return given.to(device)
        with torch.cuda.device(device):
            table = torch.empty(given.shape, dtype=torch.int64, device=device)
            count = given.numel()
            if torch.cuda.is_current_stream_capturing():
                # Memory that no copy was ever made from: one can neither ask nor wait for an event now.
                spare, self._spare = self._spare, None
                if spare is None or spare.numel() < count:
                    spare = _pinned(count)
                self._captured.append(spare)
                table.view(-1).copy_(_filled(spare, given), non_blocking=True)
                return table
            host = self._free(count)
            table.view(-1).copy_(_filled(host, given), non_blocking=True)
            self._ring.append((host, torch.cuda.current_stream(device).record_event()))
            if self._spare is None or self._spare.numel() < count:
                self._spare = _pinned(count)
        return table

    def _free(self, count: int) -> Tensor:
        if len(self._ring) < RING:
            return _pinned(count)
        host, event = self._ring.popleft()
        event.synchronize()
        return host if host.numel() >= count else _pinned(count)


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, pin_memory=True)


def _filled(host: Tensor, given: Tensor) -> Tensor:
    return host[: given.numel()].copy_(given.view(-1))
