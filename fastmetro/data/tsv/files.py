"""TSV files with an index of lines: random access, and writing that leaves whole files or none.

Beside X.tsv lies X.lineidx, which holds the byte at which each line starts, one decimal number per line.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fastmetro.files import naming, remove_unfinished, replace_all, replacing, temporary_beside

MAX_ROW_BYTES = 256 << 20
"""Longer rows are refused: a broken index must not read a whole file into memory."""
_CHUNK = 16 << 20
_LOOKED_AT = 64
"""Lines of an index that are held against the data when it is read."""


def index_path(path: Path) -> Path:
    """X.lineidx of X.tsv."""
    return path.with_suffix(".lineidx")


class TsvFile:
    """Rows of a TSV file by number. Memory-mapped; copies in other processes open the file for themselves.

    The index is read from X.lineidx. Where that is missing, or does not end where the file does, it is made anew and
    saved beside the file, if the folder can be written.

    Args:
        path: X.tsv.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"TSV file {str(path)!r} does not exist")
        self._map: mmap.mmap | None = None
        self._owner = 0
        self._size = self.path.stat().st_size
        self._starts = self._index()

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    def row(self, number: int) -> list[bytes]:
        """The cells of a row, without white space around them.

        Raises:
            IndexError: there is no such row.
            ValueError: the index does not fit the file, or the row has more than ``MAX_ROW_BYTES``.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, got {number}")
        start = int(self._starts[number])
        end = int(self._starts[number + 1]) if number + 1 < len(self) else self._size
        if end - start > MAX_ROW_BYTES:
            raise ValueError(f"{self.path}, row {number}: {end - start} bytes, at most {MAX_ROW_BYTES} are read")
        content = self._mapped()
        line = content[start:end]
        cut_off = end != self._size and line[-1:] != b"\n"
        if cut_off or (start and content[start - 1 : start] != b"\n") or line.find(b"\n") not in (-1, len(line) - 1):
            raise ValueError(f"{self.path}, row {number}: {index_path(self.path).name} does not fit; delete it")
        return [cell.strip() for cell in line.split(b"\t")]

    def _mapped(self) -> mmap.mmap:
        """The file's content; a fork must not share the parent's, which the parent may close."""
        if self._map is None or self._owner != os.getpid():
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._owner = os.getpid()
        return self._map

    def _index(self) -> np.ndarray:
        if self._size == 0:
            return np.zeros(0, np.int64)
        starts = self._read_index()
        if starts is None:
            starts = _line_starts(self.path)
            self._save(starts)
        return starts

    def _read_index(self) -> np.ndarray | None:
        """The starts of all lines, or None where there is no index that ends with the file."""
        try:
            starts = np.array(index_path(self.path).read_bytes().split(), dtype=np.int64)
        except (OSError, ValueError, OverflowError):
            return None
        if not len(starts) or starts[0] != 0 or starts[-1] >= self._size or not bool((np.diff(starts) > 0).all()):
            return None
        last = int(starts[-1])
        if self._size - last > MAX_ROW_BYTES:
            return None
        content = self._mapped()
        some = starts[1 :: max(1, len(starts) // _LOOKED_AT)]  # the rows of the data may have changed places
        if any(content[start - 1 : start] != b"\n" for start in (*some.tolist(), last) if start):
            return None
        return starts if content[last : self._size].find(b"\n") in (-1, self._size - last - 1) else None

    def _save(self, starts: np.ndarray) -> None:
        # A folder that cannot be written: the index is made again next time.
        with contextlib.suppress(OSError), replacing(index_path(self.path)) as temporary:
            temporary.write_text("".join(f"{start}\n" for start in starts), encoding="ascii")


def _line_starts(path: Path) -> np.ndarray:
    """Where each line starts; a last line without a line feed counts, too."""
    found, offset = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            found.append(ends.astype(np.int64) + offset + 1)
            offset += len(chunk)
    starts = np.concatenate(found)
    return starts[starts < offset]


class TsvWriter:
    """Writes X.tsv and X.lineidx, row by row, with bounded memory.

    Both files appear when the block ends without an exception; else nothing does, and what was there before stays.
    What a writer of the same file that was killed has left behind is removed.

        with TsvWriter("train.label.tsv") as writer:
            writer.write([key, json.dumps([label])])

    Args:
        path: X.tsv; its folder must exist. One writer at a time may write it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows = 0
        self._offset = 0
        self._stack = contextlib.ExitStack()
        self._moves: list[tuple[Path, Path]] = []
        self._files: list[BinaryIO] = []

    def __enter__(self) -> TsvWriter:
        with naming(self.path), contextlib.ExitStack() as stack:
            for place in (self.path, index_path(self.path)):
                remove_unfinished(place)
                part = stack.enter_context(temporary_beside(place))
                self._moves.append((part, place))
                self._files.append(part.open("wb"))
            self._stack = stack.pop_all()
        return self

    def write(self, cells: Sequence[str | bytes]) -> int:
        """Append a row; its number.

        Raises:
            TypeError: one text instead of a sequence of them, or a cell that is neither text nor bytes.
            ValueError: there is no cell, or one holds a tab, a line feed or a carriage return.
            RuntimeError: outside of the block, or after :meth:`finish`.
            OSError: the row cannot be written; it names the file.
        """
        if not self._files:
            raise RuntimeError("TsvWriter is used within its `with` block")
        encoded = _encoded(cells)
        for number, cell in enumerate(encoded):
            if any(mark in cell for mark in (b"\t", b"\n", b"\r")):
                raise ValueError(f"cells: number {number} holds a tab or a line end, {cell[:60]!r}")
        line = b"\t".join(encoded) + b"\n"
        with naming(self.path):
            self._files[0].write(line)
            self._files[1].write(b"%d\n" % self._offset)
        self._offset += len(line)
        self.rows += 1
        return self.rows - 1

    def finish(self) -> list[tuple[Path, Path]]:
        """Write out what is left, for who puts the files of several writers in their places at once.

        Returns:
            Each finished file and its place, for :func:`fastmetro.files.replace_all` within the block.

        Raises:
            OSError: the disk is full, or the like; it names the file.
        """
        with naming(self.path):
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        self._files = []
        moves, self._moves = self._moves, []
        return moves

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                if kind is None:
                    replace_all(self.finish())
            finally:
                for file in self._files:
                    with contextlib.suppress(OSError):  # of a full disk: what it still holds is not wanted
                        file.close()
                self._files, self._moves = [], []


def _encoded(cells: Sequence[str | bytes]) -> list[bytes]:
    """Texts in UTF-8. A text is a sequence of texts, too, and bytes(17) are 17 zeros: neither may pass unnoticed."""
    if isinstance(cells, (str, bytes)) or not isinstance(cells, Sequence):
        raise TypeError(f"cells must be a list of texts or bytes, got {reprlib.repr(cells)}")
    if not cells:
        raise ValueError("cells: a row has at least one")
    for number, cell in enumerate(cells):
        if not isinstance(cell, (str, bytes)):
            raise TypeError(f"cells: number {number} must be text or bytes, got {reprlib.repr(cell)}")
    return [cell.encode() if isinstance(cell, str) else cell for cell in cells]
