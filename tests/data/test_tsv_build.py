"""A data set in the published format from images and arrays of annotations."""

from __future__ import annotations

import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tsv_cases import jpeg, rows, write_set

from fastmetro import cli
from fastmetro.data.tsv import TsvSource, build, build_data, check_data, decode_image, parse_label


def annotations(folder: Path, count: int = 4, joints: int = 24, pose: int = 72, **changed: Any) -> Path:
    """Images in two folders below `images`, and a .npz of random numbers."""
    generator = np.random.default_rng(0)
    names = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(40 + i, 30, i))
    arrays = {
        "imgname": np.array(names),
        "center": generator.normal(size=(count, 2)),
        "scale": generator.uniform(0.5, 2, size=count),
        "part": generator.normal(size=(count, joints, 3)),
        "S": generator.normal(size=(count, joints, 4)),
        "pose": generator.normal(size=(count, pose)),
        "shape": generator.normal(size=(count, 10)),
        "gender": np.array(["male", "female"] * count)[:count],
        "unused": np.zeros(3),
    } | changed
    path = folder / "some.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_what_is_built_is_what_was_given(tmp_path: Path) -> None:
    path = annotations(tmp_path)
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    assert (report.path, report.rows, report.skipped) == (tmp_path / "train.yaml", 4, [])
    source, arrays = TsvSource(report.path), np.load(path)
    for number in range(4):
        row = source.row(number)
        label = parse_label(row.label, "body")
        assert row.key == arrays["imgname"][number]
        assert decode_image(row.image).shape == (40 + number, 30, 3)
        for name, array in (("center", "center"), ("joints_2d", "part"), ("joints_3d", "S"), ("pose", "pose")):
            np.testing.assert_allclose(getattr(label, name), arrays[array][number], rtol=1e-6)
        assert label.scale == pytest.approx(arrays["scale"][number]) and label.gender == arrays["gender"][number]
        assert label.has_joints_2d and label.has_joints_3d and label.has_smpl
    assert check_data(report.path).bad == 0
    assert len(list(tmp_path.glob("train.*.lineidx"))) == 4


def test_rows_are_on_the_disk_while_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory does not grow with the number of rows."""
    path, size = annotations(tmp_path), 100_000
    written: list[int] = []

    def image(folder: Path, key: str) -> tuple[bytes, dict[str, int]]:
        written.append(sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".npz"))
        return bytes(size), {"height": 40, "width": 30}

    monkeypatch.setattr(build, "_image", image)
    build_data(path, tmp_path / "images", tmp_path / "train")
    folders = written[0]
    assert [round((count - folders) / (size * 4 / 3)) for count in written] == [0, 1, 2, 3]


def test_flags_tell_what_is_there(tmp_path: Path) -> None:
    path = annotations(tmp_path, S=None, has_smpl=np.array([1, 0, 1, 0]))
    source = TsvSource(build_data(path, tmp_path / "images", tmp_path / "train").path)
    labels = [parse_label(source.row(number).label, "body") for number in range(4)]
    assert [label.has_smpl for label in labels] == [True, False, True, False]
    assert all(label.has_joints_2d and not label.has_joints_3d for label in labels)


def test_hands(tmp_path: Path) -> None:
    path = annotations(tmp_path, 2, 21, 48)
    report = build_data(path, tmp_path / "images", tmp_path / "hand", "hand")
    assert check_data(report.path, "hand").bad == 0 and check_data(report.path, "body").bad == 2


def test_a_check_names_keys_and_what_is_asked_wrongly(tmp_path: Path) -> None:
    path = write_set(tmp_path, [*rows(2), ("the key", b"!", "[{", "40 30")])
    assert "row 2: 'the key', broken base64" in check_data(path).text()
    with pytest.raises(ValueError, match="kind must be one of 'body', 'hand', got 'feet'"):
        check_data(path, "feet")  # type: ignore[arg-type]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no rows"):
        check_data(write_set(tmp_path / "none", []))


def test_rows_that_cannot_be_used_are_skipped_and_told(tmp_path: Path) -> None:
    center = np.zeros((4, 2))
    center[0, 1] = np.nan
    path = annotations(tmp_path, center=center)
    (tmp_path / "images" / "b" / "1.jpg").unlink()
    (tmp_path / "images" / "a" / "2.jpg").write_bytes(jpeg()[:300])
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    assert report.rows == 1 and [name for name, _ in report.skipped] == ["a/0.jpg", "b/1.jpg", "a/2.jpg"]
    assert [why.split(":")[0] for _, why in report.skipped] == ["not finite", "missing image", "broken image"]
    assert TsvSource(report.path).row(0).key == "b/3.jpg"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_image_that_cannot_be_read_is_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    path, read = annotations(tmp_path), Path.read_bytes

    def refused(file: Path) -> bytes:
        if file.name == "1.jpg":
            raise OSError(code, os.strerror(code), str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", refused)
    arguments = ["data", "build", str(path), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "train")]
    assert cli.main(arguments) == 0
    printed, message = capsys.readouterr(), f"unreadable image: [Errno {code}] {os.strerror(code)}: '"
    assert f"left out b/1.jpg: {message}" in printed.err and "3 rows" in printed.out and "1 left out" in printed.out
    source = TsvSource(tmp_path / "train.yaml")
    assert [source.row(number).key for number in range(3)] == ["a/0.jpg", "a/2.jpg", "b/3.jpg"]


def test_names_that_lead_nowhere_are_bad_rows(tmp_path: Path) -> None:
    path = annotations(tmp_path, 3, imgname=np.array(["x" * 300 + ".jpg", "loop.jpg", "a/2.jpg"]))
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    # Which of the two it is depends on Python: later ones take what they cannot look at for missing.
    assert report.rows == 1 and {why.split(":")[0] for _, why in report.skipped} <= {
        "unreadable image",
        "missing image",
    }


def test_image_names_stay_below_their_folder(tmp_path: Path) -> None:
    path = annotations(tmp_path, 2, imgname=np.array(["../secret.jpg", "b/1.jpg"]))
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    assert report.skipped == [("../secret.jpg", "image outside of the folder: ../secret.jpg")]


def test_folders_may_be_links_to_other_disks(tmp_path: Path) -> None:
    path = annotations(tmp_path, 2, imgname=np.array(["disk/1.jpg", str(tmp_path / "other" / "1.jpg")]))
    (tmp_path / "images" / "b").rename(tmp_path / "other")
    (tmp_path / "images" / "disk").symlink_to(tmp_path / "other")
    report = build_data(path, tmp_path / "images", tmp_path / "t")
    assert report.rows == 1 and [why.split(":")[0] for _, why in report.skipped] == ["image outside of the folder"]


def test_joints_without_any_confidence_are_none(tmp_path: Path) -> None:
    points, part = np.ones((2, 24, 4)), np.ones((2, 24, 3))
    points[0, :, 3] = part[1, :, 2] = 0
    build_data(annotations(tmp_path, 2, S=points, part=part), tmp_path / "images", tmp_path / "t")
    labels = [parse_label(TsvSource(tmp_path / "t.yaml").row(row).label, "body") for row in range(2)]
    assert [bool(label.has_joints_3d) for label in labels] == [False, True]
    assert [bool(label.has_joints_2d) for label in labels] == [True, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"center": None}, "annotations: .* has no array 'center'"),
        ({"imgname": np.array("a/0.jpg")}, r"imgname must be \[N\], got \[\]"),
        ({"imgname": np.arange(4)}, "imgname must hold texts, got int64"),
        ({"scale": np.ones(4, complex)}, "scale must hold numbers of up to 8 bytes, got complex128"),
        ({"scale": np.ones(4, np.longdouble)}, "scale must hold numbers of up to 8 bytes, got "),
        ({"center": np.zeros((4, 2), "datetime64[s]")}, r"center must hold numbers .*, got datetime64\[s\]"),
        ({"scale": np.ones(3)}, r"scale must be \[4\], got \[3\]"),
        ({"S": np.ones((4, 17, 4))}, r"S must be \[4, 24, 4\], got \[4, 17, 4\]"),
        ({"gender": np.array([None] * 4, dtype=object)}, "is not a file of plain arrays"),
    ],
)
def test_annotations_that_do_not_fit_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = annotations(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        build_data(path, tmp_path / "images", tmp_path / "train")
    assert not list(tmp_path.glob("train*"))


def test_files_that_are_no_npz_are_named(tmp_path: Path) -> None:
    path = annotations(tmp_path, 2)
    whole = path.read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("imgname.npy").header_offset + 60
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **np.load(io.BytesIO(whole)))
    deflate = compressed.getvalue()
    damaged = deflate[:middle] + bytes(16) + deflate[middle + 16 :]
    for content in (b"", b"nonsense", buffer.getvalue(), whole[:1000], damaged):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"annotations: .*some\.npz"):
            build_data(path, tmp_path / "images", tmp_path / "train")
    assert not list(tmp_path.glob("train*"))


def test_arrays_are_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = annotations(tmp_path, 2)
    monkeypatch.setattr(build, "MAX_ARRAY_BYTES", 400)
    with pytest.raises(ValueError, match=r"'part' has [0-9]+ bytes; at most 400 are read"):
        build_data(path, tmp_path / "images", tmp_path / "train")


def test_names_in_bytes_are_texts(tmp_path: Path) -> None:
    names, genders = np.array([b"a/0.jpg", b"b/1.jpg", b"\xff.jpg"]), np.array([b"male", b"female", b"none"])
    path = annotations(tmp_path, 3, imgname=names, gender=genders)
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    source = TsvSource(report.path)
    assert [source.row(number).key for number in range(2)] == ["a/0.jpg", "b/1.jpg"]
    assert [parse_label(source.row(number).label, "body").gender for number in range(2)] == ["male", "female"]
    assert [(name, why.split(":")[0]) for name, why in report.skipped] == [("row 2", "broken text")]


@pytest.mark.parametrize("name", ["\ud800.jpg", "a\0b.jpg"])
def test_a_name_that_no_file_can_have_is_one_bad_row(tmp_path: Path, name: str) -> None:
    path = annotations(tmp_path, 2, imgname=np.array([name, "b/1.jpg"]))
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    assert report.rows == 1 and report.skipped[0][1].startswith("broken ")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_flag_that_is_not_finite_is_one_bad_row(tmp_path: Path, value: float) -> None:
    path = annotations(tmp_path, has_smpl=np.array([1, value, 0, 1]))
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    assert report.rows == 3 and report.skipped == [("b/1.jpg", "not finite: has_smpl holds NaN or infinity")]


def test_nothing_is_left_where_no_row_can_be_used(tmp_path: Path) -> None:
    path = annotations(tmp_path, scale=np.zeros(4))
    with pytest.raises(ValueError, match=r"no row can be used, the first because of .*empty box"):
        build_data(path, tmp_path / "images", tmp_path / "train")
    assert not list(tmp_path.glob("train*"))
    with pytest.raises(FileNotFoundError, match="out: folder"):
        build_data(path, tmp_path / "images", tmp_path / "no" / "train")
    with pytest.raises(FileNotFoundError, match="annotations"):
        build_data(tmp_path / "no.npz", tmp_path / "images", tmp_path / "train")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, code: int) -> None:
    """Let a function of `os` fail at one of its calls."""
    calls, real = itertools.count(1), getattr(os, name)

    def function(*arguments: Any) -> Any:
        if next(calls) == call:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, name, function)


@pytest.mark.parametrize(
    ("name", "call"), [("fsync", 1), ("fsync", 6), ("fsync", 9), *(("replace", call) for call in range(1, 19))]
)
def test_a_failed_rebuild_leaves_the_set_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    path, sets = annotations(tmp_path), tmp_path / "sets"
    sets.mkdir()
    build_data(path, tmp_path / "images", sets / "train")
    before = contents(sets)
    path = annotations(tmp_path, 2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: '.*/sets/train\."):
        fail_at(patch, name, call, errno.ENOSPC)
        build_data(path, tmp_path / "images", sets / "train")
    assert contents(sets) == before
    assert build_data(path, tmp_path / "images", sets / "train").rows == 2
    assert contents(sets).keys() == before.keys() and len(TsvSource(sets / "train.yaml")) == 2


def test_a_failed_first_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = annotations(tmp_path)
    fail_at(monkeypatch, "replace", 9, errno.EIO)
    with pytest.raises(OSError, match=r"/train\.yaml"):
        build_data(path, tmp_path / "images", tmp_path / "train")
    assert not [*tmp_path.glob("train*"), *tmp_path.glob(".train*")]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    path, folder = annotations(tmp_path), tmp_path / "train.hw.lineidx"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"/train\.hw\.lineidx"):
        build_data(path, tmp_path / "images", tmp_path / "train")
    assert [*tmp_path.glob("train*"), *tmp_path.glob(".train*")] == [folder]


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    path = annotations(tmp_path)
    command = (
        "import os, signal, sys; from fastmetro.data.tsv import build, build_data\n"
        "build.yaml.safe_dump = lambda names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_data(*sys.argv[1:])"
    )
    arguments = [str(path), str(tmp_path / "images"), str(tmp_path / "train")]
    killed = subprocess.run([sys.executable, "-c", command, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.glob(".train*"))) == 9
    build_data(path, tmp_path / "images", tmp_path / "train")
    assert not list(tmp_path.glob(".train*")) and len(TsvSource(tmp_path / "train.yaml")) == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = annotations(tmp_path)
    (tmp_path / "images" / "b" / "1.jpg").unlink()
    arguments = ["data", "build", str(path), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "train")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "3 rows" in printed.out and "b/1.jpg: missing image" in printed.err
    assert cli.main(["data", "check", str(tmp_path / "train.yaml")]) == 0


@pytest.mark.parametrize("name", ["sets", "train.yaml", "train.img.tsv", "train.yml"])
def test_out_is_the_first_part_of_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "sets").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"out must be the path and first part of names, such as sets/train, got"):
        build_data(annotations(tmp_path / "sets"), tmp_path / "sets" / "images", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_a_box_that_misses_the_image_is_left_out_of_what_is_built(tmp_path: Path) -> None:
    center = np.array([[15.0, 20.0], [1e9, 1e9], [-21.0, 20.0], [15.0, 20.0]])
    path = annotations(tmp_path, center=center, scale=np.full(4, 0.2))
    report = build_data(path, tmp_path / "images", tmp_path / "train")
    assert report.rows == 2 and [key for key, _ in report.skipped] == ["b/1.jpg", "a/2.jpg"]
    assert report.skipped[1][1] == "box misses the image: it has 40 pixels around (-21, 20), the image 30 x 42"
    assert check_data(report.path).bad == 0
