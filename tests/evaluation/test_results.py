"""The table of results takes a row whole or not at all, and says before an evaluation when it cannot."""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from fastmetro import files
from fastmetro.cli import main
from fastmetro.evaluation import results
from fastmetro.evaluation.results import COLUMNS, append_result, check_table
from fastmetro.files import check_output

OLD_COLUMNS = [name for name in COLUMNS if name not in ("auc", "auc_mesh", "f5", "f15")]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_torn_table_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    append_result(path, {"protocol": "3dpw", "command": "eval"})
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "the last line has no end"),
        (whole[:-6] + b"\n", "the row that ends in line 2 has 19 of 20 fields"),
        (whole + whole.splitlines()[1] + whole.splitlines()[1] + b"\n", "the row that ends in line 3 has 39 of 20"),
        (whole + b'"' + 19 * b"," + b"\n", "is not a table of results: unexpected end of data"),
        (whole[:-1] + b"x" * 140_000 + b"\n", "is not a table of results: field larger than field limit"),
        (b"PK\xff\xfe\x00", "is not a table of results: 'utf-8' codec"),
        (",".join(OLD_COLUMNS).encode() + b"\n", r"has the columns .* name another file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            append_result(path, {"protocol": "3dpw"})
        assert str(path) in str(error.value) and path.read_bytes() == content


def test_blank_lines_and_lines_within_a_field_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    append_result(path, {"data": 'two\nlines, and "quotes"'})
    path.write_bytes(path.read_bytes() + b"\n")
    append_result(path, {"data": "b"})
    assert [row["data"] for row in table(path)] == ['two\nlines, and "quotes"', "b"]


def test_an_empty_file_gets_a_header_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.csv").touch(mode=0o600)
    (tmp_path / "link.csv").symlink_to("real.csv")
    append_result(tmp_path / "link.csv", {"data": "a"})
    assert (tmp_path / "link.csv").is_symlink() and table(tmp_path / "real.csv")[0]["data"] == "a"
    assert (tmp_path / "real.csv").stat().st_mode & 0o777 == 0o600


def test_names_that_are_not_utf8_are_written(tmp_path: Path) -> None:
    append_result(tmp_path / "eval.csv", {"data": os.fsdecode(b"d\xff")})
    assert table(tmp_path / "eval.csv")[0]["data"] == r"d\udcff"


def _append_limited(path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError):
        append_result(path, {"data": "b" * 1000})


def test_a_row_that_could_not_be_written_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    """The file may grow by less than the row, as on a disk that gets full."""
    path = tmp_path / "eval.csv"
    append_result(path, {"data": "a"})
    before = path.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_append_limited, args=(path, len(before) + 100))
    process.start()
    process.join()
    assert process.exitcode == 0 and path.read_bytes() == before


def test_an_interrupted_write_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eval.csv"
    append_result(path, {"data": "a"})
    before = path.read_bytes()

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_result(path, {"data": "b"})
    assert path.read_bytes() == before


def _append_often(path: Path, name: str) -> None:
    for _ in range(20):
        append_result(path, {"data": name})


def test_evaluations_that_end_at_the_same_time_keep_all_rows(tmp_path: Path) -> None:
    path, context = tmp_path / "eval.csv", multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_often, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(row["data"] for row in table(path)) == sorted("abc" * 20)


def test_paths_that_cannot_be_written_are_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    check_output(tmp_path / "missing" / "folders" / "new.csv", "csv")
    for path, message in (
        (tmp_path, "csv must be a file, got the folder"),
        (Path("/dev/null"), "csv must be a file, got no plain file, /dev/null"),
        (tmp_path / "file" / "a" / "eval.csv", r"csv must lie in a folder, got .*eval\.csv: .*file is a file"),
        (Path("/proc/eval.csv"), r"csv /proc/eval\.csv cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            check_table(path)
    with pytest.raises(ValueError, match=r"out must be another file than .*file, which is read: got .*link"):
        check_output(tmp_path / "link", "out", (tmp_path / "other", tmp_path / "file"))

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        check_output(tmp_path / "new.csv", "csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_command_refuses_a_table_before_it_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the data set is looked for, even."""
    assert main(["eval", "--data", "absent.yaml", "--device", "cpu", "--csv", str(tmp_path)]) == 1
    assert f"csv must be a file, got the folder {tmp_path}" in capsys.readouterr().err
