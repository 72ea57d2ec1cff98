"""The image generator as one CUDA graph: thousands of small launches become one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro.cuda_graphs import capture, warm_up
from fastmetro.data.synthetic.dataset import SyntheticBatch, SyntheticPeople


class CapturedPeople:
    """Replays ``people`` for batches of one size. **Every call overwrites what the last one returned**, on the same
    stream: use a batch up (a training step does) before asking for the next one.

    Raises:
        ValueError: if ``people`` is not on a CUDA device, or a call has another batch size.
    """

    def __init__(self, people: SyntheticPeople, batch_size: int) -> None:
        device = people.faces.device
        if device.type != "cuda":
            raise ValueError(f"people must be on a CUDA device to be captured, it is on {device}")
        self._people = people  # the graph reads its tables, and does not keep them
        self._indices = torch.arange(batch_size, device=device)
        warm_up(self._make, device)
        self._graph, self._batch = capture(self._make, device)

    def _make(self) -> SyntheticBatch:
        return self._people(self._indices)

    def __call__(self, indices: Tensor) -> SyntheticBatch:
        """The samples ``indices``, int64 [batch_size]."""
        if indices.shape != self._indices.shape:
            raise ValueError(f"indices must have shape {tuple(self._indices.shape)}, got {tuple(indices.shape)}")
        self._indices.copy_(indices)
        self._graph.replay()
        return self._batch
