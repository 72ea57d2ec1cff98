"""Files of measurements: read as text of bounded size, checked value by value, written whole.

A file may come from anybody: every value is checked for its type and range before it is used, and what does not fit
is refused with the name of the file, the place in it, what was found and what is accepted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

Entry = TypeVar("Entry")
Families = TypeVar("Families")

LARGEST_FILE = 16 << 20  # bytes
LARGEST_NUMBER = 2**31 - 1
RECORD = ("device", "torch", "triton", "cuda", "commit", "date", "command")
"""What a family says about its measurement, all strings."""


class TuningFileError(ValueError):
    """A tuning file is not as it should be; the message names the file, what was found and what is accepted."""


class Reader:
    """Checks values of one file; `where` is the place in it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, where: str, found: Any, accepted: str) -> TuningFileError:
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return TuningFileError(f"{self.source}: {where} is {shown}; accepted: {accepted}")

    def table(self, where: str, value: Any, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
        """A JSON object, with exactly these keys if they are given."""
        if not isinstance(value, dict):
            raise self.fail(where, value, "an object")
        if keys is not None and set(value) != set(keys):
            raise self.fail(f"the set of keys of {where}", sorted(value), ", ".join(keys))
        return value

    def sequence(self, where: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(where, value, "a list")
        return value

    def number(self, where: str, value: Any, low: int = 1) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LARGEST_NUMBER:
            raise self.fail(where, value, f"an integer from {low} to {LARGEST_NUMBER}")
        return value

    def one_of(self, where: str, value: Any, accepted: tuple[Any, ...]) -> Any:
        if isinstance(value, bool) or value not in accepted:
            raise self.fail(where, value, ", ".join(map(repr, accepted)))
        return value

    def text(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > 1000 or not value.isprintable():
            raise self.fail(where, value, "printable text of up to 1000 characters")
        return value

    def family(self, where: str, value: Any, entries: str) -> tuple[dict[str, str], list[Any]]:
        """A family's record, and its list of entries, which has this name."""
        family = self.table(where, value, ("record", entries))
        record = self.table(f"{where}.record", family["record"], RECORD)
        texts = {key: self.text(f"{where}.record.{key}", record[key]) for key in RECORD}
        return texts, self.sequence(f"{where}.{entries}", family[entries])


def families_of(text: str, source: str, op: str, version: int) -> tuple[Reader, dict[str, Any]]:
    """The unread families of a file by compute capability, as `"9.0"`, and who reads them.

    Args:
        text: The contents of the file.
        source: Its name, for the messages.
        op: The op that it must be of.
        version: The format that it must have.

    Raises:
        TuningFileError: no JSON, or of another op or format.
    """
    read = Reader(source)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TuningFileError(f"{source} is not JSON: {error}; accepted: what `tune` writes") from None
    whole = read.table("the file", value, ("format", "op", "families"))
    read.one_of("format", whole["format"], (version,))
    read.one_of("op", whole["op"], (op,))
    families = read.table("families", whole["families"])
    for name in families:
        if not re.fullmatch(r"\d{1,3}\.\d{1,3}", name):
            raise read.fail("a name of families", name, "a compute capability, as '9.0'")
    return read, families


def parse_families(
    text: str,
    source: str,
    op: str,
    version: int,
    entries: str,
    read_entry: Callable[[Reader, str, Any], Entry],
    key: Callable[[Entry], Hashable],
) -> dict[str, tuple[dict[str, str], tuple[Entry, ...]]]:
    """The record and the entries of every family of a file, by compute capability.

    Args:
        text, source, op, version: as of `families_of`.
        entries: The name of a family's list.
        read_entry: Reads one of it, given its place and its unread value.
        key: What no two of a family have in common.

    Raises:
        TuningFileError: anything that is not as `dump_families` writes it.
    """
    read, families = families_of(text, source, op, version)
    found = {}
    for name, family in families.items():
        where = f"families[{name!r}]"
        record, listed = read.family(where, family, entries)
        items = tuple(read_entry(read, f"{where}.{entries}[{index}]", one) for index, one in enumerate(listed))
        if len({key(item) for item in items}) != len(items):
            raise read.fail(f"{where}.{entries}", "a list that holds a case twice", "every case once")
        found[name] = record, items
    return found


def shipped_and_own(
    shipped: Path, environment: str, read_file: Callable[[Path], dict[str, Families]]
) -> dict[str, Families]:
    """The families that are shipped, and in their place those of the file that this environment variable names.

    Raises:
        TuningFileError: a file is malformed or cannot be read.
    """
    found = read_file(shipped)
    if path := os.environ.get(environment):
        found |= read_file(Path(path))
    return found


def read_text(path: Path, largest: int = LARGEST_FILE) -> str:
    """The text of a file.

    Raises:
        TuningFileError: it cannot be read, is larger than `largest` bytes, or is no UTF-8.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(largest + 1)
    except OSError as error:
        raise TuningFileError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > largest:
        raise TuningFileError(f"{path} has more than {largest} bytes; accepted: what `tune` writes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TuningFileError(f"{path} is not UTF-8: {error.reason}; accepted: what `tune` writes") from None


def write_text(path: Path, text: str) -> None:
    """Writes the file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def dump_families(op: str, version: int, blocks: dict[str, tuple[dict[str, str], str, list[str]]]) -> str:
    """The text of a file: by compute capability a record, the name of its entries, and the text of each entry."""
    texts = []
    for name, (record, entries, lines) in sorted(blocks.items()):
        listed = "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"
        texts.append(f'{json.dumps(name)}: {{\n"record": {json.dumps(record)},\n"{entries}": {listed}\n}}')
    inner = ",\n".join(texts)
    return f'{{"format": {version}, "op": "{op}", "families": {{\n{inner}\n}}}}\n'
