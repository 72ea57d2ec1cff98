"""Look at every row of a data set, and tell which cannot be used and why."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fastmetro.data.tsv.rows import SHAPES, BadRow, Kind, decode_image, parse_label, parse_size
from fastmetro.data.tsv.source import TsvSource

_CHUNK = 64


@dataclass
class Report:
    """What a check found.

    Attributes:
        rows: of the data set.
        problems: by kind, the number of rows that have it (the first one that was found in a row counts).
        examples: (row, kind, message) of the first rows of each kind; the message begins with the row's key, if it has
            one that can be read.
        flags: how many usable rows have 2D joints, 3D joints, a mesh.
    """

    rows: int
    problems: Counter[str] = field(default_factory=Counter)
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
            lines.append(f"{problem}: {count} rows")
            lines += [f"  row {row}: {message}" for row, kind, message in self.examples if kind == problem]
        return "\n".join(lines)


def check_data(
    path: str | Path, kind: Kind = "body", workers: int = 0, examples: int = 5, progress: bool = False
) -> Report:
    """Decode every image and every label of a data set; a bad row does not stop the check.

    Args:
        path: the YAML file of the set.
        kind: what its labels are of.
        workers: further processes; 0 for none.
        examples: bad rows of each kind that are named.
        progress: whether a bar is shown.

    Raises:
        FileNotFoundError, ValueError: the set itself cannot be opened (see :class:`TsvSource`) or has no rows, there is
            no such kind, or a number is negative.
    """
    if kind not in SHAPES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, SHAPES))}, got {kind!r}")
    for name, value in (("workers", workers), ("examples", examples)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    source = TsvSource(path)
    if not len(source):
        raise ValueError(f"{path} has no rows")
    report = Report(len(source))
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    named: Counter[str] = Counter()
    with tqdm(total=len(source), unit="row", disable=not progress) as bar:
        for found in _all(source, chunks, kind, workers):
            for row, problem, message, flags in found:
                report.flags.update(flags)
                if problem:
                    report.problems[problem] += 1
                    named[problem] += 1
                    if named[problem] <= examples:
                        report.examples.append((row, problem, message))
            bar.update(len(found))
    return report


_Found = list[tuple[int, str, str, list[str]]]


def _all(source: TsvSource, chunks: Sequence[range], kind: Kind, workers: int) -> Iterator[_Found]:
    """What was found in each chunk, in order."""
    if not workers:
        yield from (_look(source, chunk, kind) for chunk in chunks)
        return
    # Processes of their own: a fork would take along whatever threads hold at that moment.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(source, kind)) as pool:
        yield from pool.map(_look_here, chunks)


_here: list[tuple[TsvSource, Kind]] = []  # of a worker process: its own copy of the source


def _begin(source: TsvSource, kind: Kind) -> None:
    _here.append((source, kind))


def _look_here(chunk: range) -> _Found:
    source, kind = _here[-1]
    return _look(source, chunk, kind)


def _look(source: TsvSource, chunk: range, kind: Kind) -> _Found:
    found: _Found = []
    for number in chunk:
        try:
            found.append((number, "", "", _flags(source, number, kind)))
        except BadRow as error:
            found.append((number, error.problem, f"{_key(source, number)}{error}", []))
        except ValueError as error:  # an index that does not fit
            found.append((number, "broken index", str(error), []))
    return found


def _key(source: TsvSource, number: int) -> str:
    """Of a row; in a composite set its file is part of it."""
    try:
        return f"{source.row(number).key!r}, "
    except ValueError:
        return ""


def _flags(source: TsvSource, number: int, kind: Kind) -> list[str]:
    """What the label has; raises BadRow where the row cannot be used."""
    row = source.row(number)
    image, label = decode_image(row.image), parse_label(row.label, kind)
    if row.size is not None and parse_size(row.size) != image.shape[:2]:
        height, width = parse_size(row.size)
        raise BadRow("size differs", f"hw says {height} x {width}, the image is {image.shape[0]} x {image.shape[1]}")
    has = {"2D joints": label.has_joints_2d, "3D joints": label.has_joints_3d, "mesh": label.has_smpl}
    return [name for name, there in has.items() if there]
