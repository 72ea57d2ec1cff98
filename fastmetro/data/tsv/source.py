"""A data set as its YAML file describes it: images, labels and sizes in TSV files, and which of their rows count."""

from __future__ import annotations

import bisect
import difflib
import reprlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmetro.data.tsv.files import TsvFile
from fastmetro.data.tsv.rows import BadRow
from fastmetro.yaml_file import read_yaml

_TABLES = ("img", "label", "hw")
_KEYS = (*_TABLES, "linelist", "composite")
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # aliases of YAML make lists of lists of lists: the usual six levels would be 250 KB


class Row(NamedTuple):
    """A row, not decoded yet.

    Attributes:
        key: name of the image; in a composite set with its file in front, as the published loader has it.
        image: base64 of a JPEG file (:func:`~fastmetro.data.tsv.rows.decode_image`).
        label: JSON (:func:`~fastmetro.data.tsv.rows.parse_label`).
        size: height and width (:func:`~fastmetro.data.tsv.rows.parse_size`), or None where the set has none.
    """

    key: str
    image: bytes
    label: bytes
    size: bytes | None


class TsvSource:
    """Rows of a METRO / FastMETRO data set, single or composite.

    A single set names one file each under `img`, `label` and (optional) `hw`, as given or beside the YAML file, and may
    name a `linelist`, a file with the number of a row per line. With `composite: true` these are lists of as many files
    each, always beside the YAML file, and each line of the `linelist` holds the number of a file and that of a row of
    it. The `linelist` is looked for as given, then beside the YAML file. Without one all rows count.

    Args:
        path: the YAML file.

    Raises:
        FileNotFoundError: a file that is named is not there.
        ValueError: the YAML file or the line list is not as described; the message names the key or the line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        settings = read_yaml(self.path, "data set")
        _check_keys(settings, self.path)
        self.composite = settings.get("composite", False)
        if not isinstance(self.composite, bool):
            raise ValueError(f"{self.path}: composite must be true or false, got {_SHORT.repr(self.composite)}")
        self._names: dict[str, list[str]] = {
            table: _names(settings, table, self.composite, self.path) for table in _TABLES if table in settings
        }
        for table in ("img", "label"):
            if table not in self._names:
                raise ValueError(f"{self.path}: {table} is missing")
        counts = {table: len(names) for table, names in self._names.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{self.path}: img, label and hw must name as many files each, got {counts}")
        self._files = {
            table: [TsvFile(self._find(name, self.composite)) for name in names] for table, names in self._names.items()
        }
        self._places = self._read_places(settings.get("linelist"))

    def __len__(self) -> int:
        return len(self._places)

    def row(self, number: int) -> Row:
        """A row by its number in the set.

        Raises:
            IndexError: there is no such row.
            BadRow: one of its lines has too few cells, or their keys differ.
            ValueError: an index file does not fit its TSV file.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, got {number}")
        file, line = (int(value) for value in self._places[number])
        cells = {table: files[file].row(line) for table, files in self._files.items()}
        for table, found in cells.items():
            if len(found) < 2:
                raise BadRow("too few cells", f"{table} has {len(found)}")
        keys = {table: found[0] for table, found in cells.items()}
        if len(set(keys.values())) > 1:
            raise BadRow("keys differ", ", ".join(f"{table} {key[:80]!r}" for table, key in keys.items()))
        try:
            key = keys["img"].decode()
        except UnicodeDecodeError:
            raise BadRow("broken key", f"not UTF-8, {keys['img'][:80]!r}") from None
        if self.composite:
            key = f"{self._names['img'][file]}_{key}"
        size = cells["hw"][1] if "hw" in cells else None
        return Row(key, cells["img"][-1], cells["label"][1], size)

    def _find(self, name: str, beside_only: bool = False) -> Path:
        """As given or beside the YAML file."""
        given = Path(name)
        return given if not beside_only and given.is_file() else self.path.parent / name

    def _read_places(self, linelist: Any) -> np.ndarray:
        """int32 [rows, 2]: file and line of each row of the set."""
        lengths = [len(file) for file in self._files["img"]]
        for table, files in self._files.items():
            for name, file, images in zip(self._names[table], files, self._files["img"], strict=True):
                if len(file) != len(images):
                    counts = f"{name} has {len(file)} rows, its images are {len(images)}"
                    raise ValueError(f"{self.path}: {counts}; {_where_keys_part(file, images)}")
        if linelist is None:
            parts = [np.stack([np.full(n, i), np.arange(n)], axis=1) for i, n in enumerate(lengths)]
            return np.concatenate(parts).astype(np.int32)
        if not isinstance(linelist, str):
            raise ValueError(f"{self.path}: linelist must name a file, got {_SHORT.repr(linelist)}")
        path = self._find(linelist)  # in a composite set, too: the published loader opens it as given there
        if not path.is_file():
            raise FileNotFoundError(f"{self.path}: linelist {linelist!r} does not exist")
        places = _read_linelist(path, self.composite)
        if not self.composite:
            places = np.concatenate([np.zeros_like(places), places], axis=1)
        _check_places(places, lengths, path)
        return places.astype(np.int32)


def _where_keys_part(table: TsvFile, images: TsvFile) -> str:
    """In words, for two tables of which one lacks rows: from the first of those on, no keys agree.

    That makes a bisection enough; reading millions of rows would take minutes.
    """

    def differ(number: int) -> bool:
        try:
            return table.row(number)[0] != images.row(number)[0]
        except ValueError:
            return True

    both = range(min(len(table), len(images)))
    row = bisect.bisect_left(both, True, key=differ)
    if row == len(both):
        return f"their keys agree up to row {row - 1}" if row else "one of them is empty"
    return f"row {row} is where their keys part" if row else "their keys differ from row 0 on"


def _check_keys(settings: dict[Any, Any], path: Path) -> None:
    """Refuse a misspelt key, without which other rows would count; of others, which a file may have, only warn."""
    for key in settings:
        if key in _KEYS:
            continue
        message = f"{path}: unknown key {reprlib.repr(key)}; known are {', '.join(_KEYS)}"
        if difflib.get_close_matches(str(key).lower(), _KEYS, 1):
            raise ValueError(message)
        warnings.warn(f"{message}: it is ignored", stacklevel=3)


def _read_linelist(path: Path, composite: bool) -> np.ndarray:
    """int64 [rows, 2] of a composite set, else [rows, 1]."""
    columns, accepted = (2, "2 numbers (file and row)") if composite else (1, "1 number (row)")
    rows: list[list[int]] = []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), start=1):
        try:
            row = [int(cell) for cell in line.split()]
        except ValueError:
            row = []
        if len(row) != columns or not all(abs(value) < 1 << 31 for value in row):
            because = f"composite is {str(composite).lower()}"
            raise ValueError(
                f"{path}, line {number}: each line must hold {accepted}, because {because}, got {reprlib.repr(line)}"
            )
        rows.append(row)
    return np.array(rows, dtype=np.int64).reshape(-1, columns)


def _check_places(places: np.ndarray, lengths: Sequence[int], path: Path) -> None:
    known = (places[:, 0] >= 0) & (places[:, 0] < len(lengths))
    limit = np.array([*lengths, 0])[np.where(known, places[:, 0], len(lengths))]
    wrong = np.flatnonzero((places[:, 1] < 0) | (places[:, 1] >= limit))
    if len(wrong):
        file, line = places[wrong[0]]
        raise ValueError(f"{path}, line {wrong[0] + 1}: there is no row {line} of file {file}")


def _names(settings: dict[str, Any], key: str, composite: bool, path: Path) -> list[str]:
    """The files under a key: a text, or with `composite` a list of texts."""
    value = settings[key]
    names = value if composite else [value]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        accepted = "a list of files, because composite is true" if composite else "a file"
        raise ValueError(f"{path}: {key} must name {accepted}, got {_SHORT.repr(value)}")
    return names
