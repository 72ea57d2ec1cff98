"""Rows of TSV files as samples for training and evaluation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmetro.compat import Compat
from fastmetro.data.augmentation import Cut, Draw, PackedCuts, augment_label, cut_image, draw_samples, finish_image
from fastmetro.data.augmentation.labels import CropLabel
from fastmetro.data.augmentation.render import render_cuts
from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.mixing import Pick
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.rows import (
    BETAS,
    LONGEST_KEY,
    SHAPES,
    BadRow,
    Kind,
    Label,
    check_box,
    decode_image,
    parse_label,
    parse_size,
)
from fastmetro.data.tsv.source import TsvSource

Place = Literal["worker", "device"]
MIN_TRIED = 1000
"""Rows that must have been tried before most of them being bad is an error, which chance then does not make."""
MAX_TRIES = 100
"""Rows that are tried for one sample."""


class UnusableData(ValueError):
    """Most rows of a batch cannot be used."""


@dataclass(frozen=True)
class TsvSample:
    """A row that can be used.

    Attributes:
        key: of the row.
        image: float32 [3, S, S], normalised; or the pixels it is to be made of, with ``draw``.
        draw: of the sample.
        label: whole, as read.
        crop: what of the label depends on the crop.
        skipped: problems of the rows that this one replaces.
    """

    key: str
    image: np.ndarray | Cut
    draw: Draw
    label: Label
    crop: CropLabel
    skipped: tuple[str, ...] = ()


class SkippedRow(NamedTuple):
    """A row that evaluation leaves out, because of this problem."""

    problem: str


@dataclass(frozen=True)
class PackedBatch:
    """A batch whose images are still to be made, on the device that it is sent to.

    Attributes:
        labels: the batch with images [B, 3, 0, 0].
        cuts: the pixels.
        size: side of the images.
        compat: how they are made.
    """

    labels: TsvBatch
    cuts: PackedCuts
    size: int
    compat: Compat | None

    def to(self, device: torch.device | str) -> TsvBatch:
        """The whole batch on a device; nothing waits for it."""
        return replace(self.labels.to(device), images=render_cuts(self.cuts.to(device), self.size, self.compat))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        return replace(self, labels=self.labels.pin_memory(), cuts=self.cuts.pin_memory())


class TsvDataset(Dataset):
    """Samples by row: with a seed augmented for training, without one plainly cropped for evaluation.

    In training the augmentation of a sample, and the row that replaces a bad one, depend on the seed and the number of
    the sample alone. An index is a :class:`~fastmetro.data.mixing.Pick`, or the number of a row, which then is the
    number of the sample, too: every epoch the same augmentation.

    A row that cannot be used is reported once by a warning, over all workers that share the data set (DataLoader's do).
    In training another row of the set, drawn at random, takes its place; in evaluation it is left out.

    Pass ``dataset.collate`` to the DataLoader; whole batches are fetched at once. Files are memory-mapped, and workers
    may be forked or spawned.

    Args:
        source: the rows.
        kind: what the labels are of.
        seed: 0 <= seed < 2**63, of the training; None for evaluation.
        view: the one draw of an evaluation (rotation and scale of a multi-scale test, protocol 3.3).
        size: side of the images.
        pixels: "worker" makes images in the worker; with "device" it only decodes and cuts, and
            :meth:`PackedBatch.to` makes the images.
        compat: "published" for the pixels and 2D joints of the published loaders; see
            :mod:`fastmetro.data.augmentation.published`.

    Raises:
        ValueError: an argument is not one of those accepted, or the set has no rows.
    """

    def __init__(
        self,
        source: TsvSource,
        kind: Kind,
        *,
        seed: int | None = None,
        view: Draw | None = None,
        size: int = 224,
        pixels: Place = "worker",
        compat: Compat | None = None,
    ) -> None:
        _check("kind", kind, tuple(SHAPES))
        _check("pixels", pixels, ("worker", "device"))
        _check("compat", compat, (None, "published"))
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must satisfy 0 <= seed < 2**63, got {seed}")
        if seed is not None and view is not None:
            raise ValueError("view is of evaluations, which have no seed; training draws its own")
        if view is not None and view.flip and kind == "hand":
            raise ValueError("view must not flip hands")
        if not len(source):
            raise ValueError(f"source must have rows, {source.path} has none")
        self.source, self.kind, self.seed, self.view, self.size = source, kind, seed, view or Draw(), size
        self.pixels, self.compat = pixels, compat
        self._reported = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # by all workers
        self._tried = torch.zeros(2, dtype=torch.int64).share_memory_()  # rows, and how many of them were bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | Pick) -> TsvSample | SkippedRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | Pick]) -> list[TsvSample | SkippedRow]:
        """The samples of a batch; the DataLoader calls this where it can.

        Raises:
            IndexError: there is no such row.
            UnusableData: of at least ``MIN_TRIED`` rows that were tried, over all workers, more than half cannot be
                used, or none of ``MAX_TRIES`` for one sample (training).
        """
        picks = [index if isinstance(index, Pick) else Pick(0, index, index) for index in indices]
        if self.seed is None:
            return [self._evaluated(pick.row) for pick in picks]
        draws = draw_samples(self.seed, [pick.number for pick in picks], self.kind)
        samples = [self._usable(pick, draw) for pick, draw in zip(picks, draws, strict=True)]
        self._check_tried(samples)
        return list(samples)

    def _check_tried(self, samples: Sequence[TsvSample]) -> None:
        bad = sum(len(sample.skipped) for sample in samples)
        self._tried += torch.tensor([len(samples) + bad, bad])
        tried, bad = self._tried.tolist()
        if tried >= MIN_TRIED and 2 * bad > tried:
            raise self._unusable(f"{bad} of {tried} rows that were tried", [p for one in samples for p in one.skipped])

    def _unusable(self, rows: str, problems: Sequence[str]) -> UnusableData:
        found = ", ".join(f"{problem}: {count}" for problem, count in Counter(problems).most_common())
        return UnusableData(
            f"{self.source.path}: {rows} cannot be used (the last ones: {found}); `fastmetro data check` names them"
        )

    def _evaluated(self, row: int) -> TsvSample | SkippedRow:
        try:
            return self._sample(row, self.view)
        except BadRow as error:
            self._report(row, error)
            return SkippedRow(error.problem)

    def _usable(self, pick: Pick, draw: Draw) -> TsvSample:
        """The picked row or, while it is bad, another one."""
        row = pick.row
        problems: list[str] = []
        while True:
            try:
                return replace(self._sample(row, draw), skipped=tuple(problems))
            except BadRow as error:
                self._report(row, error)
                problems.append(error.problem)
            if len(problems) == MAX_TRIES:
                raise self._unusable(f"{MAX_TRIES} rows that were tried for one sample", problems)
            row = self._replacement(pick.number, len(problems))

    def _replacement(self, number: int, attempt: int) -> int:
        assert self.seed is not None
        random = CounterRandom(self.seed, torch.tensor([number]))
        return int(random.integers(f"replacement {attempt}", len(self)))

    def _sample(self, row: int, draw: Draw) -> TsvSample:
        key, image, label = read_row(self.source, row, self.kind, exact=self.compat is not None)
        if self.compat is None:  # the published loaders train on a black crop
            check_box(label, *image.shape[:2])
        crop = augment_label(label, draw, self.kind, self.size, self.compat)
        cut = cut_image(image, label.center, label.scale, draw, self.size, self.compat)
        made = cut if self.pixels == "device" else finish_image(cut, draw, self.size, self.compat)
        return TsvSample(key, made, draw, label, crop)

    def _report(self, row: int, error: BadRow) -> None:
        if not bool(self._reported[row]):
            self._reported[row] = True
            try:
                key = repr(self.source.row(row).key[:LONGEST_KEY])
            except ValueError:
                key = "without a usable key"
            what = "left out" if self.seed is None else "replaced"
            warnings.warn(f"{self.source.path}, row {row}, {key}: {error}; it is {what}", RuntimeWarning, stacklevel=2)

    def collate(
        self, items: Sequence[TsvSample | SkippedRow], empty: Callable[..., np.ndarray] = np.empty
    ) -> TsvBatch | PackedBatch:
        """The batch of some samples, without those that were skipped; it may be empty.

        Args:
            items: the samples.
            empty: makes the arrays of the pixels, as ``np.empty``.
        """
        samples = [item for item in items if isinstance(item, TsvSample)]
        skipped = Counter(item.problem for item in items if isinstance(item, SkippedRow))
        skipped.update(problem for sample in samples for problem in sample.skipped)
        shapes = SHAPES[self.kind]
        cuts = [sample.image for sample in samples if isinstance(sample.image, Cut)]
        images = [sample.image for sample in samples if isinstance(sample.image, np.ndarray)]
        side = 0 if cuts else self.size
        batch = TsvBatch(
            keys=[sample.key for sample in samples],
            images=_stack(images, (len(samples), 3, side, side), empty),
            joints_2d=_stack([sample.crop.joints_2d for sample in samples], (len(samples), shapes.joints, 3)),
            joints_3d=_stack([sample.crop.joints_3d for sample in samples], (len(samples), shapes.joints, 4)),
            pose=_stack([sample.crop.pose for sample in samples], (len(samples), shapes.pose)),
            betas=_stack([sample.label.betas for sample in samples], (len(samples), BETAS)),
            has_joints_2d=torch.tensor([sample.label.has_joints_2d for sample in samples], dtype=torch.bool),
            has_joints_3d=torch.tensor([sample.label.has_joints_3d for sample in samples], dtype=torch.bool),
            has_smpl=torch.tensor([sample.label.has_smpl for sample in samples], dtype=torch.bool),
            genders=[sample.label.gender for sample in samples],
            skipped=dict(skipped),
        )
        if not cuts:
            return batch
        packed = PackedCuts.pack(cuts, [sample.draw for sample in samples], empty)
        return PackedBatch(batch, packed, self.size, self.compat)


def read_row(source: TsvSource, number: int, kind: Kind, exact: bool = False) -> tuple[str, np.ndarray, Label]:
    """Key, image (uint8 [H, W, 3]) and label of a row.

    Args:
        source: the rows.
        number: of the row.
        kind: of the label.
        exact: keep box and 2D joints in float64, see :func:`~fastmetro.data.tsv.rows.parse_label`.

    Raises:
        BadRow: the row cannot be used.
        IndexError: there is no such row.
    """
    try:
        row = source.row(number)
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow("broken index", str(error)) from None
    label = parse_label(row.label, kind, exact)
    image = decode_image(row.image)
    if row.size is not None and parse_size(row.size) != image.shape[:2]:
        height, width = parse_size(row.size)
        raise BadRow("size differs", f"hw says {height} x {width}, the image is {image.shape[0]} x {image.shape[1]}")
    return row.key, image, label


def _stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...], empty: Callable[..., np.ndarray] = np.empty) -> Tensor:
    if not arrays:
        return torch.zeros(shape)
    return torch.from_numpy(np.stack(arrays, out=empty((len(arrays), *arrays[0].shape), arrays[0].dtype)))


def _check(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
