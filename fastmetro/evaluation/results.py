"""A table of results: one row per evaluation, appended to a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

COLUMNS = ("date", "protocol", "compat", "checkpoint", "data", "count", "skipped", "mpjpe", "pa_mpjpe", "mpvpe",
           "pa_mpvpe", "processes", "commit", "device", "torch", "command")  # fmt: skip


def check_table(path: Path) -> None:
    """Raise before anything is measured where :func:`append_result` would.

    Raises:
        ValueError: the file has other columns.
    """
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            found = tuple(next(csv.reader(file), []))
        if found != COLUMNS:
            raise ValueError(f"{path} has the columns {list(found)}, results have {list(COLUMNS)}; name another file")


def append_result(path: Path, row: Mapping[str, object]) -> None:
    """Append a row; a new file gets a header first.

    Args:
        path: of the CSV file; missing folders are made.
        row: values of ``COLUMNS``; what is missing stays empty.

    Raises:
        ValueError: the file has other columns, or the row has one that the file has not.
    """
    check_table(path)
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"row must have columns of {list(COLUMNS)}, got {unknown}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())
