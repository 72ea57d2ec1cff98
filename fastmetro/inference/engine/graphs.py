"""CUDA graphs of an engine: one for each kind and number of images, the least recently used given up first."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmetro.inference.engine.precision import TensorFloat32

Outputs = dict[str, Tensor]
Steps = Sequence[Callable[[Any], Any]]

_capturing = threading.Lock()  # one capture at a time in the whole process
_MOST_SIGNATURES = 1000
_WARM_UPS = 3  # libraries choose algorithms and allocate workspaces in their first calls


@contextlib.contextmanager
def searched(dtype: torch.dtype) -> Iterator[None]:
    """Lets cuDNN time its algorithms for convolutions of half precision that it has not seen yet.

    What it takes unasked costs twice the time in some layers of large batches. In float32 the fastest algorithms are
    less exact, so there it is left alone. It holds for the whole process, all threads among it.
    """
    cudnn: Any = torch.backends.cudnn  # PyTorch's annotations lack parts of it
    before = cudnn.benchmark
    cudnn.benchmark = before or dtype.itemsize == 2
    try:
        yield
    finally:
        cudnn.benchmark = before


def run(steps: Steps, images: Tensor) -> Outputs:
    """The steps one after the other."""
    value: Any = images
    for step in steps:
        value = step(value)
    outputs: Outputs = value
    return outputs


def copies(outputs: Outputs) -> Outputs:
    """New tensors in one allocation, written by one kernel; all outputs have one dtype."""
    flat = torch.cat([value.flatten() for value in outputs.values()])
    parts = flat.split([value.numel() for value in outputs.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(outputs.items(), parts, strict=True)}


class Captured:
    """Steps one after the other on a fixed input, captured as a graph each.

    A graph starts when all of it has been submitted, which takes the longer the more nodes it has: with the backbone as
    a graph of its own, the rest is submitted while the backbone runs.

    cuBLAS gets a workspace for each stream at the stream's first product, and PyTorch may take it away again later
    (``torch.compile`` with CUDA graphs does, for all streams). So warm-ups run on another stream than the capture:
    then the workspace comes from the graphs' own memory, which nobody else is given while they live.

    Args:
        steps: the first from images, each from what the one before gave, the last to outputs of one dtype; without
            synchronisation.
        images: an example; only its shape, dtype and strides matter.
        pool: memory that graphs share, of which only one runs at a time.
        side: the stream to capture on, on which nothing else runs.
    """

    def __init__(self, steps: Steps, images: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        self.images = torch.zeros_like(images)
        self.graphs = [torch.cuda.CUDAGraph() for _ in steps]
        with _capturing:
            for _ in range(_WARM_UPS):
                run(steps, self.images)
            value: Any = self.images
            for step, graph in zip(steps, self.graphs, strict=True):
                # Other threads may go on using CUDA.
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    value = step(value)
            self.outputs: Outputs = value

    def replay(self, images: Tensor) -> Outputs:
        """Copies the images in, casting them where need be, runs, and copies the outputs out, in the current stream."""
        self.images.copy_(images, non_blocking=True)
        for graph in self.graphs:
            graph.replay()
        return copies(self.outputs)


class Graphs:
    """The captured graphs of one engine, safe under threads and streams.

    They share their memory, so whoever calls waits on the device for the call before, whatever its stream.

    Args:
        steps: see :class:`Captured`.
        dtype: of floating point images as they are captured.
        most: graphs that are kept.
        tf32: in force at every capture, whatever the process is set to by then.
    """

    def __init__(self, steps: Steps, device: torch.device, dtype: torch.dtype, most: int, tf32: TensorFloat32) -> None:
        self.steps, self.dtype, self.most, self.tf32 = steps, dtype, most, tf32
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)
        self.kept: OrderedDict[Hashable, Captured] = OrderedDict()
        self.keys: dict[Hashable, Hashable] = {}  # of images as they came
        self.lock = threading.RLock()
        self.done = torch.cuda.Event()
        self.device = device

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs for `images`, as new tensors. Captures first where this shape is not kept."""
        with self.lock, self._on_device():
            if not self.done.query():  # to wait for what has ended delays the launch all the same
                self.done.wait(torch.cuda.current_stream())
            outputs = self._captured(images).replay(images)
            self.done.record(torch.cuda.current_stream())
            return outputs

    def knows(self, images: object) -> bool:
        """Whether images like these have come before, so that they need not be checked again."""
        return isinstance(images, Tensor) and _signature(images) in self.keys

    def _on_device(self) -> contextlib.AbstractContextManager[None]:
        """Makes the engine's device the current one; a call of a few hundred microseconds feels what is left out."""
        if torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

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
        signature = _signature(images)
        key = self.keys.get(signature)
        found = self.kept.get(key)
        if found is None:
            # Float32 images in the usual order are copied in as they are; any others in the engine's order and dtype.
            plain = images.dtype == torch.uint8 or (images.dtype == torch.float32 and images.is_contiguous())
            dtype = images.dtype if plain else self.dtype
            key = (dtype, plain, *images.shape)
            if len(self.keys) >= _MOST_SIGNATURES:
                self.keys.clear()
            self.keys[signature] = key
            found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= self.most:
                self.done.synchronize()  # what is given up must not run any more
                self.kept.popitem(last=False)
            order = torch.contiguous_format if plain else torch.channels_last
            like = torch.empty(images.shape, dtype=dtype, device=self.device, memory_format=order)
            with self.tf32.applied(), searched(self.dtype):
                found = self.kept[key] = Captured(self.steps, like, self.pool, self.side)
        self.kept.move_to_end(key)
        return found


def _signature(images: Tensor) -> Hashable:
    return images.dtype, images.shape, images.stride()
