"""A table of results: one row per evaluation, appended to a CSV file."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
from collections.abc import Mapping
from pathlib import Path

from fastmetro.files import check_output

COLUMNS = ("date", "protocol", "compat", "checkpoint", "data", "count", "skipped", "mpjpe", "pa_mpjpe", "mpvpe",
           "pa_mpvpe", "auc", "auc_mesh", "f5", "f15", "processes", "commit", "device", "torch",
           "command")  # fmt: skip


def check_table(path: Path) -> None:
    """Raise before anything is measured where :func:`append_result` would.

    Raises:
        ValueError: it is no file that can be written, no table, has other columns, or a row that is not whole.
    """
    check_output(path, "csv")
    if path.exists():
        with path.open("rb") as file:
            _lock(file.fileno(), fcntl.LOCK_SH)
            _check_content(path, file.read())


def _lock(handle: int, kind: int) -> None:
    """Until the file is closed. Evaluations that end at the same time would take each other's rows for torn ones."""
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(handle, kind)


def _check_content(path: Path, content: bytes) -> None:
    if not content:
        return
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table of results: {error}; name another file") from None
    found = tuple(rows[0][1]) if rows else ()
    if found != COLUMNS:
        raise ValueError(f"{path} has the columns {list(found)}, results have {list(COLUMNS)}; name another file")
    for line, row in rows:
        if len(row) != len(COLUMNS):
            fields = f"{len(row)} of {len(COLUMNS)} fields"
            raise ValueError(f"{path}: the row that ends in line {line} has {fields}; mend it or name another file")
    if not content.endswith(b"\n"):
        raise ValueError(f"{path}: the last line has no end, it may be torn; mend it or name another file")


def append_result(path: Path, row: Mapping[str, object]) -> None:
    """Append a row, whole or not at all; a new file gets a header first.

    Args:
        path: of the CSV file; missing folders are made.
        row: values of ``COLUMNS``; what is missing stays empty.

    Raises:
        OSError: it could not be written; the table is as before.
        ValueError: the table is not as :func:`check_table` wants it, or the row has a column that the table has not.
    """
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"row must have columns of {list(COLUMNS)}, got {unknown}")
    check_output(path, "csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In place, not by a new file: that of another evaluation, which ends at the same time, would take its place.
    with path.open("a+b", buffering=0) as file:
        _lock(file.fileno(), fcntl.LOCK_EX)
        file.seek(0)
        _check_content(path, file.readall())
        before = file.seek(0, os.SEEK_END)
        content = _encoded(row, header=before == 0)
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def _encoded(row: Mapping[str, object], header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(row)
    # File names need not be UTF-8; Python holds their other bytes as surrogates.
    return text.getvalue().encode("utf-8", errors="backslashreplace")
