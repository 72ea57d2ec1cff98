"""The table of a training run: one CSV row each time something was measured."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from fastmetro.files import replacing


class CsvLog:
    """Appends rows to a CSV file, which the first one makes; rows may leave columns empty.

    When a run resumes at ``resume_step``, rows of later steps (made after the checkpoint) are dropped first.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int = 0) -> None:
        self.path, self.columns = path, columns
        rows: list[dict[str, str]] = []
        if resume_step and path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if _step(row) <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not rows:  # a log without any would keep the folder from a run that starts anew
            path.unlink(missing_ok=True)
            return
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Add one row and flush it."""
        unknown = set(row) - set(self.columns)
        if unknown:
            raise ValueError(f"row has columns {sorted(unknown)} that the log does not: {self.columns}")
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def last_step(path: Path) -> int:
    """Of the log of a run, without rows that were cut off; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return int(max((step for step in map(_step, csv.DictReader(file)) if step < float("inf")), default=0))


def _step(row: Mapping[str, str | None]) -> float:
    """Of a row; infinity for one that was cut off while it was written."""
    step = row.get("step") or ""
    return int(step) if step.isdigit() and None not in row.values() else float("inf")
