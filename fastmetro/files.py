"""Files that appear whole or not at all, folders of one process, and whether a file can be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_UNFINISHED = ".part"
_LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    Readers see the old file or the new one, never a part of one, also when the process is killed or the power fails in
    between. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        yield temporary
        _to_disk(temporary)  # else the new name may reach the disk before the content
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system does that for folders; the file is whole anyway
            _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder for the time of the block; a missing folder is made.

    The lock is one on a file ".lock", which stays. It ends with this process, however that ends, and is not its
    children's. Where the file system has no locks this is said on stderr and nobody is kept out.

    Raises:
        RuntimeError: another process has the folder.
        OSError: no file can be made in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as file:
        try:
            # Not flock, whose locks the workers of a killed training would keep.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RuntimeError(f"another run writes to {folder}: wait for its end, or choose another one") from None
            why = f"{folder} cannot be locked ({error.strerror}); do not let another run write to it"
            print(f"fastmetro: {why}", file=sys.stderr)
        yield


def was_locked(folder: Path) -> bool:
    """Whether :func:`locked` had that folder at any time."""
    return (folder / _LOCK).is_file()


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


def replace_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """Put finished files in the places of others: all of them, or none where that fails.

    The old files are set aside first, from the last to the first, and the new ones follow from the first to the last.
    A last file that names the others (YAML of a data set) is so missing, rather than wrong, while they change places.

    Args:
        moves: each finished file, beside its place, and that place.

    Raises:
        OSError: a file cannot be moved; it names the place.
    """
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    for finished, place in moves:
        with naming(place):
            _to_disk(finished)
    try:
        for finished, place in reversed(moves):
            with naming(place):
                if place.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if place.exists():
                    old = finished.with_suffix(f".old{_UNFINISHED}")
                    os.replace(place, old)
                    aside.append((old, place))
        for finished, place in moves:
            with naming(place):
                os.replace(finished, place)
            placed.append(place)
    except BaseException:
        for place in placed:
            remove_quietly(place)
        for old, place in aside:
            os.replace(old, place)
        raise
    for old, _ in aside:
        remove_quietly(old)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system name the file that the user knows: a full disk names none, a temporary file its own."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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


def remove_quietly(path: Path) -> None:
    """Remove a file if that is possible: what went wrong before must not be hidden by an error of tidying up."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed within :func:`replacing` of ``path`` has left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        left.unlink(missing_ok=True)
