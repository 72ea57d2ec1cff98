"""Whether a file can be written, found out before the work whose result it is to hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path


def check_output(path: Path, name: str, inputs: Iterable[Path] = ()) -> None:
    """Raise where the file could not be written at the end. Nothing is left behind.

    Args:
        path: of the file; missing folders will be made.
        name: of the argument, for messages.
        inputs: files that are read and must not be overwritten.

    Raises:
        ValueError: it is a folder or a device, lies in what is no folder, cannot be written, or is an input.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} must be a file, got {'the folder' if path.is_dir() else 'no plain file,'} {path}")
    if same := next((given for given in inputs if given.resolve() == path.resolve()), None):
        raise ValueError(f"{name} must be another file than {same}, which is read: got {path}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{name} must lie in a folder, got {path}: {folder} is a file")
    try:
        if path.exists():
            path.open("ab").close()
        # Tried, not asked: permissions do not tell of file systems that are read-only or take no files.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be written: {error.strerror}") from None
