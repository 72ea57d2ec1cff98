"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".part"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    Readers see the old file or the new one, never a part of one, also when the process is killed in between. Missing
    folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path``, which is removed when the block ends unless it was moved away."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    temporary = Path(name)
    try:
        try:
            os.fchmod(handle, 0o644)  # mkstemp makes files that only the owner can read
        finally:
            os.close(handle)
        yield temporary
    finally:
        remove_quietly(temporary)


def remove_quietly(path: Path) -> None:
    """Remove a file if that is possible: what went wrong before must not be hidden by an error of tidying up."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed within :func:`replacing` of ``path`` has left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        left.unlink(missing_ok=True)
