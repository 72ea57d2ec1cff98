"""Data sets as YAML files describe them, single and composite, and the check of all their rows."""

from __future__ import annotations

import concurrent.futures
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tsv_cases import cell, damaged_jpeg, jpeg, label, rows, write_set, write_tables

from fastmetro import cli
from fastmetro.data.tsv import BadRow, TsvSource, TsvWriter, check, check_data, parse_label
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.data.tsv.rows import encode_image


def keys(source: TsvSource) -> list[str]:
    return [source.row(number).key for number in range(len(source))]


def test_a_single_set(tmp_path: Path) -> None:
    source = TsvSource(write_set(tmp_path, rows()))
    assert keys(source) == ["im0", "im1", "im2"]
    assert parse_label(source.row(2).label, "body").scale == pytest.approx(2.2)
    assert source.row(0).size == b"40 30" and source.row(1).image == rows()[1][1]
    with pytest.raises(IndexError, match="rows 0 to 2, got 3"):
        source.row(3)


def test_a_line_list_chooses_rows(tmp_path: Path) -> None:
    (tmp_path / "some.tsv").write_text("2\n0\n2\n")
    assert keys(TsvSource(write_set(tmp_path, rows(), linelist="some.tsv"))) == ["im2", "im0", "im2"]


@pytest.mark.parametrize(
    ("content", "line"), [("0\n0\t1\n", 2), ("0\t1\n2\t0\n", 1), ("1\n\n0\n", 2), ("0 1", 1), ("a\n", 1), ("9" * 30, 1)]
)
def test_a_line_list_of_a_single_set_has_one_column(tmp_path: Path, content: str, line: int) -> None:
    (tmp_path / "some.tsv").write_text(content)
    message = rf"some.tsv, line {line}: each line must hold 1 number \(row\), because composite is false, got b'"
    with pytest.raises(ValueError, match=message):
        TsvSource(write_set(tmp_path, rows(), linelist="some.tsv"))


def test_a_misspelt_key_is_refused_and_another_one_warned_of(tmp_path: Path) -> None:
    for key in ("linelst", "Composite", "labels", "lable"):
        with pytest.raises(ValueError, match=rf"unknown key '{key}'; known are img, label, hw, linelist, composite$"):
            TsvSource(write_set(tmp_path, rows(), **{key: "some.tsv"}))
    with pytest.warns(UserWarning, match=r"train.yaml: unknown key 'caption'; known are .*: it is ignored"):
        assert len(TsvSource(write_set(tmp_path, rows(), caption="some.tsv"))) == 3


@pytest.mark.parametrize("key", ["img", "linelist", "composite"])
def test_aliases_make_no_message_of_megabytes(tmp_path: Path, key: str) -> None:
    path, text = write_set(tmp_path, rows()), f"a0: &a0 [{', '.join(['x' * 50] * 9)}]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 5))
    kept = "".join(f"{line}\n" for line in path.read_text().splitlines() if not line.startswith(f"{key}:"))
    path.write_text(f"{kept}{text}{key}: *a4\n")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=key) as caught:
        TsvSource(path)
    assert len(str(caught.value)) < 2000


def test_sizes_are_optional(tmp_path: Path) -> None:
    source = TsvSource(write_set(tmp_path, rows(), hw=""))
    assert source.row(0).size is None and check_data(source.path).bad == 0


@pytest.fixture
def composite(tmp_path: Path) -> Path:
    first, second = write_tables(tmp_path, rows(2), "a"), write_tables(tmp_path, rows(3, "x"), "b")
    settings = {table: [first[table], second[table]] for table in first} | {"composite": True}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_image_is_the_last_cell_of_its_row(tmp_path: Path) -> None:
    content = rows(2)
    path = write_set(tmp_path, content)
    with TsvWriter(tmp_path / "train.img.tsv") as writer:
        for row in content:
            writer.write([row[0], "something", row[1]])
    assert [TsvSource(path).row(i).image for i in range(2)] == [row[1] for row in content]
    assert check_data(path).bad == 0


def test_a_line_list_is_taken_as_given_before_the_folder_of_the_set(
    composite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(composite.read_text()) | {"linelist": "lists/some.tsv"}
    folder = tmp_path / "sets"
    folder.mkdir()
    for file in tmp_path.glob("*.*"):
        file.rename(folder / file.name)
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    for place, content, key in ((folder, "0\t0\n", "a.img.tsv_im0"), (tmp_path, "1\t2\n", "b.img.tsv_x2")):
        (place / "lists").mkdir()
        (place / "lists" / "some.tsv").write_text(content)
        assert keys(TsvSource(Path("sets/train.yaml"))) == [key]


def test_a_composite_set_names_the_file_in_its_keys(composite: Path) -> None:
    names = [f"a.img.tsv_im{i}" for i in range(2)] + [f"b.img.tsv_x{i}" for i in range(3)]
    assert keys(TsvSource(composite)) == names
    settings = yaml.safe_load(composite.read_text())
    (composite.parent / "list.tsv").write_text("1\t2\n0\t0\n")
    composite.write_text(yaml.safe_dump(settings | {"linelist": "list.tsv"}))
    assert keys(TsvSource(composite)) == ["b.img.tsv_x2", "a.img.tsv_im0"]
    for wrong in ("2\t0\n", "1\t3\n", "0\t-1\n"):
        (composite.parent / "list.tsv").write_text(wrong)
        with pytest.raises(ValueError, match=r"list.tsv, line 1: there is no row"):
            TsvSource(composite)
    (composite.parent / "list.tsv").write_text("1\t2\n0\n")
    with pytest.raises(ValueError, match="each line must hold 2 numbers"):
        TsvSource(composite)
    (composite.parent / "list.tsv").write_text("0\n1\n1\n0\n")  # as many numbers as two lines of a composite set
    with pytest.raises(ValueError, match=r"list.tsv, line 1: .* 2 numbers \(file and row\), because composite is true"):
        TsvSource(composite)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold names and values, got list"),
        ("img: [\n", "is not YAML"),
        ("img: train.img.tsv\n", "label is missing"),
        ("img: [train.img.tsv]\nlabel: train.label.tsv\n", "img must name a file, got"),
        ("img: train.img.tsv\nlabel: train.label.tsv\ncomposite: true\n", "a list of files, because composite is true"),
        ("img: train.img.tsv\nlabel: train.label.tsv\ncomposite: 3\n", "composite must be true or false, got 3"),
        ("img: train.img.tsv\nlabel: train.label.tsv\nlinelist: 7\n", "linelist must name a file, got 7"),
        ("img: train.img.tsv\nlabel: short.label.tsv\n", "short.label.tsv has 1 rows, its images are 3"),
    ],
)
def test_unusable_descriptions_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    write_tables(tmp_path, rows())
    write_tables(tmp_path, rows(1), "short")
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TsvSource(tmp_path / "set.yaml")


@pytest.mark.parametrize(
    ("labels", "where"),
    [
        ([0, 1, 2, 3, 5], "row 4 is where their keys part"),
        ([1, 2, 3, 4, 5], "their keys differ from row 0 on"),
        ([0, 1, 2, 3, 4], "their keys agree up to row 4"),
        ([0, 1, 1, 2, 3, 4, 5], "row 2 is where their keys part"),
        ([], "one of them is empty"),
    ],
)
def test_where_a_table_lacks_a_row_is_told(tmp_path: Path, labels: list[int], where: str) -> None:
    content = rows(6)
    write_tables(tmp_path, content)
    write_tables(tmp_path, [content[number] for number in labels], "other")
    (tmp_path / "set.yaml").write_text("img: train.img.tsv\nlabel: other.label.tsv\n")
    message = f"other.label.tsv has {len(labels)} rows, its images are 6; {where}"
    with pytest.raises(ValueError, match=message):
        TsvSource(tmp_path / "set.yaml")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"set\.yaml.* does not exist"):
        TsvSource(tmp_path / "set.yaml")
    path = write_set(tmp_path, rows(), label="other.tsv")
    with pytest.raises(FileNotFoundError, match=r"other\.tsv.* does not exist"):
        TsvSource(path)
    path = write_set(tmp_path, rows(), linelist="other.tsv")
    with pytest.raises(FileNotFoundError, match=r"linelist 'other\.tsv' does not exist"):
        TsvSource(path)


def test_yaml_is_data_and_not_code(tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text("img: !!python/object/apply:os.system ['touch made']\n")
    with pytest.raises(ValueError, match="is not YAML"):
        TsvSource(tmp_path / "set.yaml")


def bad_rows() -> list[tuple[str, bytes, str, str]]:
    """Usable rows among every kind of bad one."""
    good = rows(3)
    image, text, size = good[0][1:]
    return [
        good[0],
        ("base64", b"!!!", text, size),
        ("truncated", encode_image(jpeg()[:500]), text, size),
        ("json", image, "[{", size),
        ("keys", image, cell({"center": [0, 0]}), size),
        good[1],
        ("nan", image, cell(label(pose=[float("nan")] * 72)), size),
        ("joints", image, cell(label(21)), size),
        ("size", image, text, "41 30"),
        ("size2", image, text, "30 40"),
        good[2],
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_check_names_every_bad_row_and_goes_on(tmp_path: Path, workers: int) -> None:
    report = check_data(write_set(tmp_path, bad_rows()), workers=workers, examples=1)
    assert report.rows == 11 and report.bad == 8
    assert dict(report.problems) == {
        "broken base64": 1, "broken image": 1, "broken JSON": 1, "missing key": 1, "not finite": 1, "wrong shape": 1,
        "size differs": 2,
    }  # fmt: skip
    assert [(row, problem) for row, problem, _ in report.examples] == [
        (1, "broken base64"), (2, "broken image"), (3, "broken JSON"), (4, "missing key"), (6, "not finite"),
        (7, "wrong shape"), (8, "size differs"),
    ]  # fmt: skip
    assert report.flags == {"2D joints": 3, "3D joints": 3}
    text = report.text()
    assert "11 rows, 3 can be used, 8 cannot" in text and "hw says 41 x 30, the image is 40 x 30" in text
    assert "with mesh: 0" in text and "row 9" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_check_names_damaged_images_which_training_uses(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    good = rows(2)
    image = encode_image(damaged_jpeg())
    damaged = [(f"grey{i}", image, *good[0][2:]) for i in range(3)]
    path = write_set(tmp_path, [good[0], *damaged, ("bad", image, "[{", "40 30"), good[1]])
    report = check_data(path, workers=workers, examples=2)
    assert (report.rows, report.bad, report.damaged) == (6, 1, 3) and report.problems == {"broken JSON": 1}
    assert report.flags["2D joints"] == 5
    assert [(row, kind) for row, kind, _ in report.examples] == [
        (1, "damaged JPEG"), (2, "damaged JPEG"), (4, "broken JSON"),
    ]  # fmt: skip
    text = report.text()
    assert "6 rows, 5 can be used, 1 cannot" in text and "damaged JPEG: 3 rows, used as they are" in text
    assert "row 2: 'grey1', damaged JPEG: Corrupt JPEG data: premature end of data segment" in text
    dataset = TsvDataset(TsvSource(path), "body", seed=1, size=8)
    assert [dataset[row].skipped for row in (0, 1, 2, 3)] == [()] * 4  # type: ignore[union-attr]
    path = write_set(tmp_path, [good[0], *damaged])
    assert cli.main(["data", "check", str(path)]) == 0 and "'grey0', damaged JPEG" in capsys.readouterr().out


def test_a_check_looks_at_many_rows_in_order_with_few_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that is given all rows at once would hold what it found in them until it is asked."""
    submitted, most = 0, 0

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers: int, context: Any, **begin: Any) -> None:
            super().__init__(workers, **begin)

        def submit(self, *arguments: Any) -> Any:
            nonlocal submitted
            submitted += 1
            return super().submit(*arguments)

    def look(source: TsvSource, chunk: range, kind: str) -> list[check._Finding]:
        time.sleep(0.002 * (chunk.start % 3))
        return [check._Finding(row, "odd", str(row), usable=False) for row in chunk]

    monkeypatch.setattr(check, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(check, "_look", look)
    monkeypatch.setattr(check, "_CHUNK", 1)
    good = rows(1)
    lines = write_set(tmp_path, good)
    (tmp_path / "lines.tsv").write_text("0\n" * 100)
    lines.write_text(lines.read_text() + "linelist: lines.tsv\n")
    source = TsvSource(lines)
    seen = []
    for found in check._all(source, (range(row, row + 1) for row in range(100)), "body", 2):
        most = max(most, submitted - len(seen))
        seen.append(found[0].row)
    assert seen == list(range(100)) and 2 < most <= 4 * 2 + 1


def test_a_large_set_is_shared_by_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert check.default_workers(1_000_000) == 6 and check.default_workers(100) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert check.default_workers(1_000_000) == 0


def test_the_command_takes_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write_set(tmp_path, rows()), []
    monkeypatch.setattr(check, "default_workers", lambda count: calls.append(count) or 0)
    assert cli.main(["data", "check", str(path)]) == 0 and calls == [3]
    assert cli.main(["data", "check", str(path), "--workers", "0"]) == 0 and calls == [3]


def test_keys_that_differ_and_cells_that_lack(tmp_path: Path) -> None:
    path = write_set(tmp_path, rows())
    label_file = tmp_path / "train.label.tsv"
    lines = label_file.read_text().splitlines()
    lines[0], lines[1] = lines[0].replace("im0", "imX"), "im1"
    label_file.write_text("\n".join(lines) + "\n")
    (tmp_path / "train.label.lineidx").unlink()
    source = TsvSource(path)
    with pytest.raises(BadRow, match="keys differ: img b'im0', label b'imX'"):
        source.row(0)
    with pytest.raises(BadRow, match="too few cells: label has 1"):
        source.row(1)
    assert check_data(path).problems == {"keys differ": 1, "too few cells": 1}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_set(tmp_path, bad_rows())
    assert cli.main(["data", "check", str(path)]) == 1
    assert "8 cannot" in capsys.readouterr().out
    path = write_set(tmp_path, rows())
    assert cli.main(["data", "check", str(path), "--examples", "2"]) == 0
    assert cli.main(["data", "check", str(tmp_path / "no.yaml")]) == 1
    assert "does not exist" in capsys.readouterr().err
