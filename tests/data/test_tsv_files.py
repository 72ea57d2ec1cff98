"""TSV files: random access, the index that is made anew, and writing that leaves whole files or none."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmetro.data.tsv import TsvFile, TsvWriter
from fastmetro.data.tsv import files as files_module

ROWS = [["a", "first"], ["b", ""], ["späte", "x" * 5000], ["c"]]


def write(path: Path, rows: list[list[str]] = ROWS) -> Path:
    with TsvWriter(path) as writer:
        assert [writer.write(row) for row in rows] == list(range(len(rows)))
    return path


def content(file: TsvFile) -> list[list[str]]:
    return [[cell.decode() for cell in file.row(number)] for number in range(len(file))]


def read_row(file: TsvFile, number: int) -> list[bytes]:
    return file.row(number)


def test_what_is_written_is_read_and_the_index_counts_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv")
    assert content(TsvFile(path)) == ROWS
    starts = [int(line) for line in (tmp_path / "x.lineidx").read_text().split()]
    lines = path.read_bytes().splitlines(keepends=True)
    assert starts == [sum(map(len, lines[:number])) for number in range(len(lines))]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["x.lineidx", "x.tsv"]


@settings(max_examples=30)
@given(rows=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"])), min_size=1), max_size=8))
def test_any_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "x.tsv", rows)
    assert content(TsvFile(path)) == rows
    (path.parent / "x.lineidx").unlink()
    assert content(TsvFile(path)) == rows


@pytest.mark.parametrize("index", [None, "", "0\n", "0\nabc\n", "0\n8\n", "5\n0\n", "0\n99999999\n"])
def test_an_index_that_is_missing_or_wrong_is_made_anew(tmp_path: Path, index: str | None) -> None:
    path, lineidx = write(tmp_path / "x.tsv"), tmp_path / "x.lineidx"
    right = lineidx.read_text()
    lineidx.unlink()
    if index is not None:
        lineidx.write_text(index)
    assert content(TsvFile(path)) == ROWS
    assert lineidx.read_text() == right


def test_an_index_of_rows_that_have_changed_places_is_made_again(tmp_path: Path) -> None:
    """The size and the last line are still right."""
    path = write(tmp_path / "x.tsv")
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*reversed(lines), last]))
    assert content(TsvFile(path)) == [*reversed(ROWS[:-1]), ROWS[-1]]
    starts = [int(line) for line in (tmp_path / "x.lineidx").read_text().split()]
    assert starts == [sum(map(len, lines[::-1][:number])) for number in range(len(ROWS))]


def test_an_index_that_is_wrong_in_the_middle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_LOOKED_AT", 1)
    path = write(tmp_path / "x.tsv")
    starts = (tmp_path / "x.lineidx").read_text().split()
    starts[2] = str(int(starts[2]) + 1)
    (tmp_path / "x.lineidx").write_text("\n".join(starts))
    file = TsvFile(path)
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"row {number}: x.lineidx does not fit; delete it"):
            file.row(number)
    assert file.row(3) == [b"c"]


def test_a_row_that_an_index_cuts_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_LOOKED_AT", 1)
    path = write(tmp_path / "x.tsv")
    starts = [int(start) for start in (tmp_path / "x.lineidx").read_text().split()]
    starts[2] -= 1
    (tmp_path / "x.lineidx").write_text("\n".join(map(str, starts)))
    with pytest.raises(ValueError, match=r"row 1: x.lineidx does not fit"):
        TsvFile(path).row(1)


def test_rows_over_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.tsv")
    (tmp_path / "x.lineidx").unlink()
    monkeypatch.setattr(files_module, "_CHUNK", 7)
    assert content(TsvFile(path)) == ROWS


def test_a_last_line_without_a_line_feed(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("a\t1\r\nb\t 2 ")
    assert content(TsvFile(path)) == [["a", "1"], ["b", "2"]]
    assert (tmp_path / "x.lineidx").read_text() == "0\n5\n"


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    """Two short rows, four gigabytes apart (a hole, which takes no disk)."""
    path, far = tmp_path / "x.tsv", 1 << 32
    with path.open("wb") as file:
        file.write(b"a\tfirst\n")
        file.seek(far - 1)
        file.write(b"\nb\tlast\n")
    (tmp_path / "x.lineidx").write_text(f"0\n8\n{far}\n")
    tracemalloc.start()
    try:
        file = TsvFile(path)
        assert (file.row(0), file.row(2)) == ([b"a", b"first"], [b"b", b"last"])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match=f"row 1: {far - 8} bytes, at most"):
        file.row(1)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", [])
    assert len(TsvFile(path)) == 0
    with pytest.raises(IndexError, match="got 0"):
        TsvFile(path).row(0)


def test_an_index_that_cannot_be_saved_is_kept_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv")
    (tmp_path / "x.lineidx").unlink()
    (tmp_path / "x.lineidx").mkdir()
    assert content(TsvFile(path)) == ROWS
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made, moved or removed, as on a read-only mount (root may write anywhere)."""

    def refuse(*arguments: object, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments))

    for owner, name in ((Path, "write_text"), (Path, "unlink"), (os, "replace"), (tempfile, "mkstemp")):
        monkeypatch.setattr(owner, name, refuse)


def test_a_file_without_an_index_opens_on_a_read_only_mount(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = write(tmp_path / "x.tsv")
    (tmp_path / "x.lineidx").unlink()
    request.getfixturevalue("read_only")
    assert content(TsvFile(path)) == ROWS


def test_an_error_of_tidying_up_does_not_hide_the_first(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(RuntimeError, match="half way"), TsvWriter(tmp_path / "x.tsv"):
        request.getfixturevalue("read_only")
        raise RuntimeError("half way")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path: Path, method: str) -> None:
    file = TsvFile(write(tmp_path / "x.tsv"))
    file.row(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap(read_row, [(file, number) for number in range(4)] * 3)
    assert found == [file.row(number) for number in range(4)] * 3
    assert pickle.loads(pickle.dumps(file)).row(2) == file.row(2)


def test_rows_that_are_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TsvFile(write(tmp_path / "x.tsv"))
    monkeypatch.setattr(files_module, "MAX_ROW_BYTES", 100)
    with pytest.raises(ValueError, match="row 2: 5008 bytes, at most 100 are read"):
        file.row(2)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv")
    before = path.read_bytes(), (tmp_path / "x.lineidx").read_bytes()
    with pytest.raises(RuntimeError, match="half way"), TsvWriter(path) as writer:
        writer.write(["new"])
        raise RuntimeError("half way")
    assert (path.read_bytes(), (tmp_path / "x.lineidx").read_bytes()) == before
    assert sorted(child.name for child in tmp_path.iterdir()) == ["x.lineidx", "x.tsv"]
    write(path, [["new"]])
    assert content(TsvFile(path)) == [["new"]]


def test_cells_that_would_break_a_row_are_refused(tmp_path: Path) -> None:
    with TsvWriter(tmp_path / "x.tsv") as writer:
        for cell in ("a\tb", "a\n", b"\r"):
            with pytest.raises(ValueError, match="number 1 holds a tab or a line end"):
                writer.write(["key", cell])
        with pytest.raises(ValueError, match="at least one"):
            writer.write([])
        writer.write(["key", b"value"])
    assert content(TsvFile(tmp_path / "x.tsv")) == [["key", "value"]]
    with pytest.raises(RuntimeError, match="within its `with` block"):
        writer.write(["late"])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["k", 17], "cells: number 1 must be text or bytes, got 17"),
        ([None], "cells: number 0 must be text or bytes, got None"),
        (["k", bytearray(b"a")], r"cells: number 1 must be text or bytes, got bytearray\(b'a'\)"),
        ("abc", "cells must be a list of texts or bytes, got 'abc'"),
        (b"abc", "cells must be a list of texts or bytes, got b'abc'"),
        (17, "cells must be a list of texts or bytes, got 17"),
    ],
)
def test_what_is_no_cell_is_named(tmp_path: Path, cells: Any, message: str) -> None:
    with TsvWriter(tmp_path / "x.tsv") as writer:
        with pytest.raises(TypeError, match=message):
            writer.write(cells)
        writer.write(("key", b"value"))
    assert content(TsvFile(tmp_path / "x.tsv")) == [["key", "value"]]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.tsv.* does not exist"):
        TsvFile(tmp_path / "nothing.tsv")
