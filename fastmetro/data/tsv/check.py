"""Look at every row of a data set, and tell which cannot be used and why."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fastmetro.data.tsv.rows import (
    DAMAGED,
    LONGEST_KEY,
    SHAPES,
    BadRow,
    Kind,
    check_box,
    decode_image,
    parse_label,
    parse_size,
)
from fastmetro.data.tsv.source import TsvSource

_CHUNK = 64
_AHEAD = 4
"""Chunks that wait for each process, so that none is idle and memory stays bounded."""
_LOOKED_AT = 100
_FEW_ROWS = 4096
"""One process looks at them in less time than others need to start."""


@dataclass
class Report:
    """What a check found.

    Attributes:
        rows: of the data set.
        problems: by kind, the number of rows that have it (the first one that was found in a row counts).
        damaged: how many usable rows have a JPEG that libjpeg-turbo calls corrupt.
        examples: (row, kind, message) of the first rows of each kind, ``DAMAGED`` among them; the message begins with
            the row's key, if it has one that can be read.
        flags: how many usable rows have 2D joints, 3D joints, a mesh.
    """

    rows: int
    problems: Counter[str] = field(default_factory=Counter)
    damaged: int = 0
    examples: list[tuple[int, str, str]] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)

    @property
    def bad(self) -> int:
        """Rows that cannot be used."""
        return sum(self.problems.values())

    def text(self) -> str:
        """For people."""
        lines = [f"{self.rows} rows, {self.rows - self.bad} can be used, {self.bad} cannot"]
        lines += [f"  with {name}: {self.flags[name]}" for name in ("2D joints", "3D joints", "mesh")]
        for problem, count in self.problems.most_common():
            lines += [f"{problem}: {count} rows", *self._examples(problem)]
        if self.damaged:
            lines.append(f"{DAMAGED}: {self.damaged} rows, used as they are: parts may be grey or shifted")
            lines += self._examples(DAMAGED)
        return "\n".join(lines)

    def _examples(self, problem: str) -> list[str]:
        return [f"  row {row}: {message}" for row, kind, message in self.examples if kind == problem]


class _Finding(NamedTuple):
    """What was found in a row: a problem that it has, "" for none, and what its label has if it can be used."""

    row: int
    problem: str = ""
    message: str = ""
    usable: bool = True
    flags: tuple[str, ...] = ()


def check_data(
    path: str | Path, kind: Kind = "body", workers: int | None = 0, examples: int = 5, progress: bool = False
) -> Report:
    """Decode every image and every label of a data set; a bad row does not stop the check.

    Args:
        path: the YAML file of the set.
        kind: what its labels are of.
        workers: further processes; 0 for none, None for one per core where there are rows enough for them.
        examples: rows of each kind of problem that are named.
        progress: whether a bar is shown.

    Raises:
        FileNotFoundError, ValueError: the set itself cannot be opened (see :class:`TsvSource`) or has no rows, there is
            no such kind, or a number is negative.
    """
    if kind not in SHAPES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, SHAPES))}, got {kind!r}")
    for name, value in (("workers", workers), ("examples", examples)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    source = TsvSource(path)
    if not len(source):
        raise ValueError(f"{path} has no rows")
    if workers is None:
        workers = default_workers(len(source))
    report = Report(len(source))
    chunks = (range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK))
    named: Counter[str] = Counter()
    with tqdm(total=len(source), unit="row", disable=not progress) as bar:
        for found in _all(source, chunks, kind, workers):
            for row, problem, message, usable, flags in found:
                report.flags.update(flags)
                if problem:
                    if usable:
                        report.damaged += 1
                    else:
                        report.problems[problem] += 1
                    named[problem] += 1
                    if named[problem] <= examples:
                        report.examples.append((row, problem, message))
            bar.update(len(found))
    return report


def check_kind(source: TsvSource, kind: Kind, name: str) -> None:
    """Raise where the first rows have labels of the other kind: a set of hands for a body, or the other way round.

    Args:
        source: the data set.
        kind: what its labels must be of.
        name: of the setting that names it, for the message.

    Raises:
        ValueError: there is a label of the other kind in the first rows, and none of this one.
    """
    others: Kind = "hand" if kind == "body" else "body"
    found = set()
    for number in range(min(_LOOKED_AT, len(source))):
        for one in (kind, others):
            with contextlib.suppress(ValueError):  # a bad row, of which the reader tells
                parse_label(source.row(number).label, one)
                found.add(one)
        if kind in found:
            return
    if found == {others}:
        raise ValueError(f"{name} must be of a {kind}, got {source.path}, whose labels are of a {others}")


def default_workers(rows: int) -> int:
    """Processes for so many rows: one per core that this process may use; none for a few rows or on one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and rows > _FEW_ROWS else 0


def _all(source: TsvSource, chunks: Iterator[range], kind: Kind, workers: int) -> Iterator[list[_Finding]]:
    """What was found in each chunk, in order."""
    if not workers:
        yield from (_look(source, chunk, kind) for chunk in chunks)
        return
    # Processes of their own: a fork would take along whatever threads hold at that moment.
    spawn = multiprocessing.get_context("spawn")
    waiting: deque[Future[list[_Finding]]] = deque()
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(source, kind)) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(_look_here, chunk))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_here: list[tuple[TsvSource, Kind]] = []  # of a worker process: its own copy of the source


def _begin(source: TsvSource, kind: Kind) -> None:
    _here.append((source, kind))


def _look_here(chunk: range) -> list[_Finding]:
    source, kind = _here[-1]
    return _look(source, chunk, kind)


def _look(source: TsvSource, chunk: range, kind: Kind) -> list[_Finding]:
    found = []
    for number in chunk:
        try:
            found.append(_usable(source, number, kind))
        except BadRow as error:
            found.append(_Finding(number, error.problem, f"{_key(source, number)}{error}", usable=False))
        except ValueError as error:  # an index that does not fit
            found.append(_Finding(number, "broken index", str(error), usable=False))
    return found


def _key(source: TsvSource, number: int) -> str:
    """Of a row; in a composite set its file is part of it."""
    try:
        return f"{source.row(number).key[:LONGEST_KEY]!r}, "
    except ValueError:
        return ""


def _usable(source: TsvSource, number: int, kind: Kind) -> _Finding:
    """What the label has, and whether the image is damaged; raises BadRow where the row cannot be used."""
    row = source.row(number)
    problem = message = ""
    try:
        image = decode_image(row.image, strict=True)
    except BadRow as error:
        if error.problem != DAMAGED:
            raise
        problem, message, image = error.problem, f"{row.key!r}, {error}", decode_image(row.image)
    label = parse_label(row.label, kind)
    if row.size is not None and parse_size(row.size) != image.shape[:2]:
        height, width = parse_size(row.size)
        raise BadRow("size differs", f"hw says {height} x {width}, the image is {image.shape[0]} x {image.shape[1]}")
    check_box(label, *image.shape[:2])
    has = {"2D joints": label.has_joints_2d, "3D joints": label.has_joints_3d, "mesh": label.has_smpl}
    return _Finding(number, problem, message, flags=tuple(name for name, there in has.items() if there))
