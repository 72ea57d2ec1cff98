"""CUDA graphs of an engine: one for each kind and number of images, the least recently used given up first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]

_capturing = threading.Lock()  # one capture at a time in the whole process
_WARM_UPS = 3  # libraries choose algorithms and allocate workspaces in their first calls


def copies(outputs: Outputs) -> Outputs:
    """New tensors in one allocation, written by one kernel; all outputs have one dtype."""
    flat = torch.cat([value.flatten() for value in outputs.values()])
    parts = flat.split([value.numel() for value in outputs.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(outputs.items(), parts, strict=True)}


class Captured:
    """`run` on a fixed input, captured.

    Args:
        run: from images to outputs of one dtype, without synchronisation.
        images: an example; only its shape, dtype and strides matter.
        pool: memory that graphs share, of which only one runs at a time.
        side: the stream to capture on. Always the same one, because what the warm-ups allocate stays with it.
    """

    def __init__(self, run: Callable[[Tensor], Outputs], images: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        self.images = torch.zeros_like(images)
        self.graph = torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(images.device))
        with _capturing:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run(self.images)
            side.synchronize()
            # Other threads may go on using CUDA.
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.outputs = run(self.images)
        torch.cuda.current_stream(images.device).wait_stream(side)

    def replay(self, images: Tensor) -> Outputs:
        """Copies the images in (casting them), runs, and copies the outputs out, all in the current stream."""
        self.images.copy_(images, non_blocking=True)
        self.graph.replay()
        return copies(self.outputs)


class Graphs:
    """The captured graphs of one engine, safe under threads and streams.

    They share their memory, so whoever calls waits on the device for the call before, whatever its stream.

    Args:
        run: see :class:`Captured`.
        dtype: of floating point images as they are captured.
        most: graphs that are kept.
    """

    def __init__(self, run: Callable[[Tensor], Outputs], device: torch.device, dtype: torch.dtype, most: int) -> None:
        self.run, self.dtype, self.most = run, dtype, most
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)
        self.kept: OrderedDict[Hashable, Captured] = OrderedDict()
        self.lock = threading.RLock()
        self.done = torch.cuda.Event()
        self.device = device

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs for `images`, as new tensors. Captures first where this shape is not kept."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            self.done.wait(stream)
            outputs = self._captured(images).replay(images)
            self.done.record(stream)
            return outputs

    def alone(self, work: Callable[[], None]) -> None:
        """Runs `work` between two replays."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            self.done.wait(stream)
            work()
            self.done.record(stream)

    def prepare(self, images: Tensor) -> None:
        """Captures for images like these, if that was not done."""
        with self.lock, torch.cuda.device(self.device):
            self.done.wait(torch.cuda.current_stream())
            self._captured(images)
            self.done.record(torch.cuda.current_stream())

    def _captured(self, images: Tensor) -> Captured:
        dtype = torch.uint8 if images.dtype == torch.uint8 else self.dtype
        key = (dtype, *images.shape)
        found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= self.most:
                self.done.synchronize()  # what is given up must not run any more
                self.kept.popitem(last=False)
            order = torch.contiguous_format if dtype == torch.uint8 else torch.channels_last
            like = torch.empty(images.shape, dtype=dtype, device=self.device, memory_format=order)
            found = self.kept[key] = Captured(self.run, like, self.pool, self.side)
        self.kept.move_to_end(key)
        return found
