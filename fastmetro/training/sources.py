"""Where the batches of a training come from: synthetic images, TSV files, or both."""

from __future__ import annotations

import multiprocessing.connection
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmetro.data.labels import MeshLabels
from fastmetro.data.mixing import MixedSampler, Pick, Source
from fastmetro.data.synthetic.dataset import SyntheticBatch, normalize_images
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.data.tsv.loader import MixedDataset, make_loader
from fastmetro.data.tsv.slots import Slots
from fastmetro.distributed import World

if TYPE_CHECKING:
    from fastmetro.data.ground_truth import GroundTruth

People = Callable[[Tensor], SyntheticBatch]
"""int64 sample indices [B] -> images and labels, on the device of the indices."""

_SECONDS_TO_DIE = 2.0
_AHEAD = 2


class SourceFailed(RuntimeError):
    """No batch could be had: a worker process died, or most rows cannot be used. The training's state is whole."""


class Batch(NamedTuple):
    """This process's share of a step, on its device.

    Attributes:
        images: normalised [B, 3, H, W], channels last.
        labels: of the images.
        skipped: rows that could not be used and were replaced, by problem.
    """

    images: Tensor
    labels: MeshLabels
    skipped: Mapping[str, int] = {}


class Batches(Protocol):
    """Batches by step, the same for a step whenever it is asked for; steps are asked for one after the other."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            SourceFailed: there is none.
        """


@dataclass
class SyntheticBatches:
    """Synthetic images, made on the device, on a GPU beside the step before; no two steps share one.

    Attributes:
        people: makes them; may write each batch over the one before.
        batch_size: of all processes together.
        device: of the images.
        world: the processes that share a batch; each makes its own part.
        overfit: repeat the first so many images; 0: never one.
    """

    people: People
    batch_size: int
    device: torch.device
    world: World = field(default_factory=World)
    overfit: int = 0

    def __post_init__(self) -> None:
        self._beside = _Beside(self.device) if self.device.type == "cuda" else None

    def indices(self, step: int) -> Tensor:
        """int64, the samples of this process in a step."""
        count = self.batch_size // self.world.size
        first = step * self.batch_size + self.world.rank * count
        indices = torch.arange(first, first + count, device=self.device)
        return indices % self.overfit if self.overfit else indices

    def __call__(self, step: int) -> Batch:
        """See :class:`Batches`."""
        return self._make(step) if self._beside is None else self._beside(lambda: self._make(step))

    def _make(self, step: int) -> Batch:
        made = self.people(self.indices(step))
        return Batch(_channels_last(normalize_images(made.images)), made.labels.clone())


class TsvBatches:
    """Rows of TSV files, read ahead by worker processes, and synthetic images among them.

    Args:
        sets: data sets for training.
        truth: makes labels of the network's mesh from a batch.
        sampler: deals the samples; its sources are the sets in order and, with people, the synthetic images.
        device: of the batches.
        workers: processes that read ahead; 0 reads in this one.
        people: makes the synthetic images; of those of another mesh than the network's only the joints count.
    """

    def __init__(
        self,
        sets: Sequence[TsvDataset],
        truth: GroundTruth,
        sampler: MixedSampler,
        device: torch.device,
        workers: int,
        people: People | None = None,
    ) -> None:
        self._sets, self._truth, self._sampler, self._people = list(sets), truth, sampler, people
        self._device, self._workers = device, workers
        self._batches: Iterator[Any] | None = None
        self._slots: Slots | None = None
        self._next = -1
        self._beside = _Beside(device) if device.type == "cuda" else None

    def __call__(self, step: int) -> Batch:
        """See :class:`Batches`. A step that does not follow the one before starts the workers anew."""
        if self._batches is None or step != self._next:
            self._batches = self._read_from(step)
        self._next = step + 1
        return self._make(step) if self._beside is None else self._beside(lambda: self._make(step))

    def _make(self, step: int) -> Batch:
        batch = self._read(step)
        if self._slots is not None:
            batch = self._slots.take(batch, self._device)
        batch = batch.to(self._device)
        read = Batch(_channels_last(batch.images), self._truth(batch), batch.skipped)
        if self._people is None:
            return read
        synthetic = [pick.row for pick in self._sampler.picks(step) if pick.source == len(self._sets)]
        return _joined(read, self._people(torch.tensor(synthetic, device=self._device))) if synthetic else read

    def _read(self, step: int) -> Any:
        """The next batch of the loader, as it comes."""
        assert self._batches is not None
        try:
            return next(self._batches)
        except Exception as error:  # whatever a worker may raise: the state of the training is whole, and is saved
            why = f"{error}{_dead_workers(self._batches, error)}"
            self._batches = None
            raise SourceFailed(f"the samples of step {step} could not be read: {why}") from error

    def _read_from(self, step: int) -> Iterator[Any]:
        sets: list[TsvDataset | None] = [*self._sets, None] if self._people is not None else [*self._sets]
        steps = _Steps(self._sampler, step)
        on_gpu = self._device.type == "cuda"
        self._slots = None
        if self._workers and Slots.exist():
            self._slots = Slots(self._workers, self._share * _slot_bytes(self._sets[0]))
            if on_gpu:
                self._slots.lock_pages()
        pin = on_gpu and self._slots is None
        batches = iter(make_loader(MixedDataset(sets), steps, workers=self._workers, pin_memory=pin, slots=self._slots))
        if self._workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises wherever this process is when a worker dies, amid a step: its state would be
            # lost. The next batch that is asked for finds out, too.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return batches

    @property
    def _share(self) -> int:
        """Samples of this process in a batch."""
        return self._sampler.batch_size // self._sampler.world_size


def _slot_bytes(dataset: TsvDataset) -> int:
    """Of a sample in a slot: its labels, and its pixels; of cuts those of a box of 2.3 times the side of the crop."""
    return (16 if dataset.pixels == "device" else 12) * dataset.size**2 + 8192


class _Beside:
    """Makes batches on a stream of their own, so that copies and crops run beside the training step before.

    The host runs at most ``_AHEAD`` steps ahead of the device, so that not more batches than that are on it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # what batches are made with was made there
        self._ends: deque[torch.cuda.Event] = deque()

    def __call__(self, make: Callable[[], Batch]) -> Batch:
        current = torch.cuda.current_stream(self._device)
        end = torch.cuda.Event(blocking=True)
        end.record(current)
        self._ends.append(end)
        if len(self._ends) > _AHEAD:
            self._ends.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            batch = make()
        current.wait_stream(self._stream)
        for tensor in (batch.images, *vars(batch.labels).values()):
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
        return batch


def _dead_workers(batches: Iterator[Any], error: Exception) -> str:
    """What an error that only tells of a broken connection leaves out; empty where there is nothing to add."""
    if "DataLoader worker" in str(error):
        return ""
    workers = getattr(batches, "_workers", ())
    if workers and isinstance(error, (OSError, EOFError)):  # connections break before a process counts as dead
        sentinels = [worker.sentinel for worker in workers]
        ended = multiprocessing.connection.wait(sentinels, timeout=_SECONDS_TO_DIE)
        for worker, sentinel in zip(workers, sentinels, strict=True):
            if sentinel in ended:
                worker.join(_SECONDS_TO_DIE)  # a pipe like the others: it, too, closes before the process counts
    dead = [str(worker.pid) for worker in workers if not worker.is_alive()]
    return f"; DataLoader worker (pid {', '.join(dead)}) is dead" if dead else ""


@dataclass(frozen=True)
class _Steps:
    """The sampler's steps from one on."""

    sampler: MixedSampler
    first: int

    def __iter__(self) -> Iterator[list[Pick]]:
        step = self.first
        while True:
            yield self.sampler.picks(step)
            step += 1


def make_sampler(
    sets: Sequence[TsvDataset],
    shares: Sequence[float],
    synthetic_share: float,
    *,
    batch_size: int,
    seed: int,
    world: World,
) -> MixedSampler:
    """Deals samples from sets and synthetic images.

    Args:
        sets: with rows.
        shares: of each set among the sets; by their lengths where empty.
        synthetic_share: of synthetic images in all samples, 0 <= share < 1.
        batch_size, seed, world: of the training.

    Raises:
        ValueError: as many shares as sets are accepted, all positive.
    """
    if shares and len(shares) != len(sets):
        raise ValueError(f"data.shares must be one share per file, got {len(shares)} for {len(sets)} files")
    parts = list(shares) or [float(len(part)) for part in sets]
    read = [share / sum(parts) * (1 - synthetic_share) for share in parts]
    sources = [Source(share, len(part)) for share, part in zip(read, sets, strict=True)]
    if synthetic_share:
        sources.append(Source(synthetic_share))
    return MixedSampler(sources, batch_size, seed, rank=world.rank, world_size=world.size)


def _joined(read: Batch, made: SyntheticBatch) -> Batch:
    """Both, one after the other. Vertices of another mesh are left out, and so are labels that not both have."""
    ours, theirs = read.labels, made.labels
    if theirs.vertices.shape[1:] != ours.vertices.shape[1:]:
        empty = ours.vertices.new_zeros((len(theirs.vertices), *ours.vertices.shape[1:]))
        values = {**vars(theirs), "vertices": empty, "has_vertices": torch.zeros_like(theirs.has_vertices)}
    else:
        values = dict(vars(theirs))
    if ours.joints_3d.shape[-1] == 4 and theirs.joints_3d.shape[-1] == 3:  # confidences
        values["joints_3d"] = torch.cat([theirs.joints_3d, torch.ones_like(theirs.joints_3d[..., :1])], -1)
    joined: dict[str, Any] = {}
    for item in fields(MeshLabels):
        mine, other = getattr(ours, item.name), values[item.name]
        joined[item.name] = None if mine is None else torch.cat([mine, _filled(other, mine, len(made.images))])
    images = torch.cat([read.images, normalize_images(made.images)])
    return Batch(_channels_last(images), MeshLabels(**joined), read.skipped)


def _filled(value: Tensor | None, like: Tensor, count: int) -> Tensor:
    """The value, or zeros for labels that synthetic people of another mesh do not have."""
    return like.new_zeros((count, *like.shape[1:])) if value is None else value.to(like.dtype)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
