"""CUDA graphs of an engine: one for each kind and number of images, the least recently used given up first."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmetro.inference.engine.direct_input import DirectInput
from fastmetro.inference.engine.precision import TensorFloat32

Outputs = dict[str, Tensor]
Work = Callable[[Tensor], Outputs]

_capturing = threading.Lock()  # one capture at a time in the whole process
_MOST_SIGNATURES = 1000
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Of a device: the address of the current stream, as Triton and Inductor ask for it."""
_ALIGNMENT = 32  # bytes; PyTorch tells cuDNN how its operands are aligned, up to that, and Triton's kernels rely on 16
_DEFAULT_STREAM = 0
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


def copies(outputs: Outputs) -> Outputs:
    """New tensors in one allocation, written by one kernel; all outputs have one dtype."""
    flat = torch.cat([value.flatten() for value in outputs.values()])
    parts = flat.split([value.numel() for value in outputs.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(outputs.items(), parts, strict=True)}


class Key(NamedTuple):
    """What images are captured as."""

    dtype: torch.dtype
    plain: bool
    shape: torch.Size

    @property
    def order(self) -> torch.memory_format:
        return torch.contiguous_format if self.plain else torch.channels_last


class Captured:
    """Work on images, captured as one CUDA graph.

    The graph reads the images of a call where they are, if it can be made to (`direct`); else, and where they are not
    as they were captured, they are copied to where it reads them.

    cuBLAS gets a workspace for each stream at the stream's first product, and PyTorch may take it away again later
    (``torch.compile`` with CUDA graphs does, for all streams). So warm-ups run on another stream than the capture:
    then the workspace comes from the graph's own memory, which nobody else is given while it lives.

    Args:
        work: from images to outputs of one dtype, without synchronisation.
        images: an example; only its shape, dtype and strides matter.
        pool: memory that graphs share, of which only one runs at a time.
        side: the stream to capture on, on which nothing else runs.

    Attributes:
        images: what is copied in.
        outputs: what every launch writes to.
        direct: whether the graph can read images where they are.
    """

    def __init__(self, work: Work, images: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        self.images = torch.zeros_like(images)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with _capturing:
            for _ in range(_WARM_UPS):
                work(self.images)
            # Other threads may go on using CUDA.
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.outputs: Outputs = work(self.images)
            self.graph.instantiate()
        self._input = DirectInput.find(self.graph, self.images)
        if self._input is not None and not self._reads_nothing_else():
            self._input.read(self.images.data_ptr())
            self._input = None
        self.direct = self._input is not None

    def launch(self, images: Tensor, alike: bool) -> None:
        """Submits the graph for these images to the current stream.

        Args:
            images: of the captured shape. If they are not alike they are copied in, cast where need be.
            alike: whether they have the captured dtype and order, on the same device.
        """
        address = images.data_ptr() if alike and self._input is not None else 0
        if address and address % _ALIGNMENT == 0:
            self._read(address)
        else:
            self._read(self.images.data_ptr())
            with torch.inference_mode():
                self.images.copy_(images, non_blocking=True)
        self.graph.replay()

    def _read(self, address: int) -> None:
        if self._input is not None:
            self._input.read(address)

    def _reads_nothing_else(self) -> bool:
        """Whether images read where they are give the bits of copied ones, while other numbers lie in `self.images`."""
        generator = torch.Generator(self.images.device).manual_seed(0)
        images = torch.empty_like(self.images)
        if images.dtype == torch.uint8:
            images.random_(0, 256, generator=generator)
        else:
            images.normal_(generator=generator)
        self.launch(images, alike=False)
        expected = copies(self.outputs)
        others = torch.full_like(images, 1 if images.dtype == torch.uint8 else torch.nan)
        self.launch(others, alike=False)
        if _same(self.outputs, expected):
            return False  # images that have no influence show nothing; outputs that are NaN are unlike all, too
        self._read(images.data_ptr())
        self.graph.replay()
        return _same(self.outputs, expected)


class Graphs:
    """The captured graphs of one engine, safe under threads and streams.

    They share their memory, so whoever calls waits on the device for the call before, whatever its stream.

    Args:
        work: see :class:`Captured`.
        dtype: of floating point images as they are captured.
        most: graphs that are kept.
        tf32: in force at every capture, whatever the process is set to by then.
    """

    def __init__(self, work: Work, device: torch.device, dtype: torch.dtype, most: int, tf32: TensorFloat32) -> None:
        self.work, self.dtype, self.most, self.tf32 = work, dtype, most, tf32
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)
        self.kept: OrderedDict[Key, Captured] = OrderedDict()
        self.keys: dict[Hashable, tuple[Key, bool]] = {}  # of images as they came, and whether they are as captured
        self.lock = threading.RLock()
        self.done = torch.cuda.Event()
        self.stream: int | None = None  # of the call before
        self.device = device
        weakref.finalize(self, _ended, self.done).atexit = False

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs for `images`, as new tensors. Captures first where this shape is not kept."""
        return self._outputs(images, *self._known(images))

    def again(self, images: Tensor) -> Outputs | None:
        """The same for images like earlier ones, which need not be checked again; None for others."""
        known = self.keys.get(_signature(images))
        return None if known is None else self._outputs(images, *known)

    def alone(self, work: Callable[[], None]) -> None:
        """Runs `work` between two replays."""
        with self.lock, torch.cuda.device(self.device):
            stream, self.stream = torch.cuda.current_stream(), None
            self.done.wait(stream)
            work()
            self.done.record(stream)

    def prepare(self, images: Tensor) -> None:
        """Captures for images like these, if that was not done."""
        with self.lock, torch.cuda.device(self.device):
            self.stream = None
            self.done.wait(torch.cuda.current_stream())
            self._captured(self._known(images)[0])
            self.done.record(torch.cuda.current_stream())

    def _outputs(self, images: Tensor, key: Key, alike: bool) -> Outputs:
        """Of a call. What is ahead of the launch delays it; what is behind it the host does beside the graph."""
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._outputs(images, key, alike)
        with self.lock:
            self._follow()
            captured = self.kept.get(key) or self._captured(key)
            captured.launch(images, alike)
            self.kept.move_to_end(key)
            with torch.inference_mode():
                outputs = copies(captured.outputs)
            self.done.record(torch.cuda.current_stream())
            return outputs

    def _follow(self) -> None:
        """Lets the current stream wait for the work before, which the default stream does if it has that, too."""
        before, self.stream = self.stream, None if _raw_stream is None else _raw_stream(self.device.index)
        if before == self.stream == _DEFAULT_STREAM:  # others may have ended, and their addresses be another's by now
            return
        if not self.done.query():  # to wait for what has ended delays the launch all the same
            self.done.wait(torch.cuda.current_stream())

    def _known(self, images: Tensor) -> tuple[Key, bool]:
        """How images like these are captured, and whether they are like that themselves; known from now on."""
        # Float32 images in the usual order are captured as they are; any others in the engine's order and dtype.
        plain = images.dtype == torch.uint8 or (images.dtype == torch.float32 and images.is_contiguous())
        key = Key(images.dtype if plain else self.dtype, plain, images.shape)
        alike = (
            type(images) is Tensor
            and images.device == self.device
            and images.dtype == key.dtype
            and images.is_contiguous(memory_format=key.order)
            and not images.is_neg()
        )
        with self.lock:
            if len(self.keys) >= _MOST_SIGNATURES:
                self.keys.clear()
            self.keys[_signature(images)] = key, alike
        return key, alike

    def _captured(self, key: Key) -> Captured:
        found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= self.most:
                self.done.synchronize()  # what is given up must not run any more
                self.kept.popitem(last=False)
            with torch.inference_mode(), self.tf32.applied(), searched(self.dtype):
                like = torch.empty(key.shape, dtype=key.dtype, device=self.device, memory_format=key.order)
                found = self.kept[key] = Captured(self.work, like, self.pool, self.side)
        return found


def _ended(last: torch.cuda.Event) -> None:
    """Waits for the last call of graphs that are given up: other streams may be given the memory that it reads."""
    if not torch.cuda.is_current_stream_capturing():  # which must not wait
        last.synchronize()


def _signature(images: Tensor) -> Hashable:
    """All of images that decides how they are read, but for their address."""
    return type(images), images.dtype, images.shape, images.stride(), images.device, images.is_neg()


def _same(outputs: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(outputs[name], value) for name, value in expected.items())
