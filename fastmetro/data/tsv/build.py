"""Make a data set in the published format from image files and arrays of annotations, one row at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from fastmetro.data.tsv.files import TsvWriter
from fastmetro.data.tsv.rows import BETAS, SHAPES, BadRow, Kind, check_box, decode_image, encode_image, parse_label
from fastmetro.files import naming, remove_unfinished, replace_all, temporary_beside
from fastmetro.meshes.unpickle import MAX_BYTES, read_object_npz

MAX_IMAGE_BYTES = 128 << 20
MAX_ARRAY_BYTES = MAX_BYTES  # a small file may hold zeros without end
_TABLES = ("img", "label", "hw", "linelist")


@dataclass
class BuildReport:
    """What was built.

    Attributes:
        path: the YAML file of the set.
        rows: written.
        skipped: (image name, why) of annotations that made no row.
    """

    path: Path
    rows: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def build_data(
    annotations: str | Path, images: str | Path, out: str | Path, kind: Kind = "body", progress: bool = False
) -> BuildReport:
    """Write OUT.yaml, OUT.img.tsv, OUT.label.tsv, OUT.hw.tsv, OUT.linelist.tsv and their index files.

    One image is in memory at a time. A row whose image is missing, broken or may not be read, or whose numbers are not
    finite, is skipped and reported. Where the whole fails, nothing is left behind, and a set that was there before
    stays whole.

    Args:
        annotations: a .npz file as GraphCMR and SPIN have them, N samples: `imgname` [N] (below `images`), `center`
            [N, 2] and `scale` [N] (box side / 200, pixels); optional `part` [N, J, 3] (2D joints and confidence,
            pixels), `S` [N, J, 4] (3D joints and confidence, metres), `pose` [N, P], `shape` [N, 10], `has_smpl` [N],
            `gender` [N]. A body has J = 24 and P = 72, a hand 21 and 48. Names and genders are texts, or bytes in
            UTF-8. Flags are 1 where an array is given, unless `has_smpl` is, too.
        images: the folder that image names start from.
        out: path and first part of the names of the files.
        kind: what the annotations are of.
        progress: whether a bar is shown.

    Raises:
        FileNotFoundError: no such annotations, or no folder for the result.
        ValueError: ``out`` is a folder or ends as a file does; the annotations are not such a file, or an array is
            missing, too large, or has another type or shape; the message names it.
        OSError: a file cannot be written; the message names it.
    """
    out, folder = Path(out), Path(images)
    if out.is_dir() or out.suffix in (".yaml", ".yml", ".tsv") or not out.name:
        raise ValueError(f"out must be the path and first part of names, such as sets/train, got {out}")
    arrays = _read_annotations(Path(annotations), kind)
    for name, place in (("out", out.parent), ("images", folder)):
        if not place.is_dir():
            raise FileNotFoundError(f"{name}: folder {str(place)!r} does not exist")
    names = {table: f"{out.name}.{table}.tsv" for table in _TABLES}
    report = BuildReport(out.with_name(f"{out.name}.yaml"))
    with ExitStack() as stack:
        writers = {table: stack.enter_context(TsvWriter(out.parent / name)) for table, name in names.items()}
        for row in tqdm(range(len(arrays["imgname"])), unit="row", disable=not progress):
            key = f"row {row}"  # until its name is known
            try:
                key = _text(arrays["imgname"][row])
                image, size = _image(folder, key)
                text = json.dumps([_label(arrays, row, kind)])
                check_box(parse_label(text.encode(), kind), size["height"], size["width"])
            except BadRow as error:
                report.skipped.append((key, str(error)))
                continue
            writers["img"].write([key, encode_image(image)])
            writers["label"].write([key, text])
            writers["hw"].write([key, json.dumps([size])])
            writers["linelist"].write([str(report.rows)])
            report.rows += 1
        if not report.rows:
            raise ValueError(f"{annotations}: no row can be used, the first because of {report.skipped[:1]}")
        _place(list(writers.values()), names, report.path, stack)
    return report


def _place(writers: Sequence[TsvWriter], names: dict[str, str], path: Path, stack: ExitStack) -> None:
    """Put all files in their places when the last one is on the disk: until then the set that was there is whole."""
    remove_unfinished(path)
    with naming(path):
        temporary = stack.enter_context(temporary_beside(path))
        with temporary.open("w", encoding="utf-8") as file:
            file.write(yaml.safe_dump(names))
            file.flush()
            os.fsync(file.fileno())
    replace_all([*(move for writer in writers for move in writer.finish()), (temporary, path)])


def _read_annotations(path: Path, kind: Kind) -> dict[str, np.ndarray]:
    """The arrays, of the right shapes."""
    if not path.is_file():
        raise FileNotFoundError(f"annotations {str(path)!r} do not exist")
    shapes = SHAPES[kind]
    known: dict[str, tuple[int, ...]] = {
        "imgname": (), "center": (2,), "scale": (), "part": (shapes.joints, 3), "S": (shapes.joints, 4),
        "pose": (shapes.pose,), "shape": (BETAS,), "has_smpl": (), "gender": (),
    }  # fmt: skip
    names = ("imgname", "center", "scale")
    try:
        arrays = read_object_npz(path, names, MAX_ARRAY_BYTES, optional=(name for name in known if name not in names))
    except ValueError as error:
        raise ValueError(f"annotations: {error}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise ValueError(f"{path} is not a file of plain arrays: {name} holds objects")
        accepted, kinds = ("texts", "SU") if name in ("imgname", "gender") else ("numbers of up to 8 bytes", "biuf")
        if array.dtype.kind not in kinds or (kinds == "biuf" and array.dtype.itemsize > 8):
            raise ValueError(f"{path}: {name} must hold {accepted}, got {array.dtype}")
    if arrays["imgname"].ndim != 1:
        raise ValueError(f"{path}: imgname must be [N], got {list(arrays['imgname'].shape)}")
    count = len(arrays["imgname"])
    for name, array in arrays.items():
        if array.shape != (count, *known[name]):
            expected = "".join(f", {size}" for size in known[name])
            raise ValueError(f"{path}: {name} must be [{count}{expected}], got {list(array.shape)}")
    return arrays


def _label(arrays: dict[str, np.ndarray], row: int, kind: Kind) -> dict[str, Any]:
    """The label of a sample."""
    shapes = SHAPES[kind]
    zeros = {"part": (shapes.joints, 3), "S": (shapes.joints, 4), "pose": (shapes.pose,), "shape": (BETAS,)}

    def value(name: str) -> list[Any]:
        found: list[Any] = (arrays[name][row] if name in arrays else np.zeros(zeros[name])).tolist()
        return found

    has_smpl = float(arrays["has_smpl"][row]) if "has_smpl" in arrays else float("pose" in arrays)
    return {
        "center": arrays["center"][row].tolist(),
        "scale": float(arrays["scale"][row]),
        "2d_joints": value("part"),
        "3d_joints": value("S"),
        "pose": value("pose"),
        "betas": value("shape"),
        # Where all joints are placeholders without confidence, the sample has none.
        "has_2d_joints": int("part" in arrays and arrays["part"][row][:, -1].any()),
        "has_3d_joints": int("S" in arrays and arrays["S"][row][:, -1].any()),
        # What is not finite stays: parse_label refuses the row and says why.
        "has_smpl": int(has_smpl) if math.isfinite(has_smpl) else has_smpl,
        "gender": _text(arrays["gender"][row]) if "gender" in arrays else "none",
    }


def _text(value: Any) -> str:
    """A text of an array of texts or of bytes."""
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        text.encode()  # a lone surrogate cannot be written
    except UnicodeError as error:
        raise BadRow("broken text", str(error)) from None
    return text


def _image(folder: Path, key: str) -> tuple[bytes, dict[str, int]]:
    """The file's bytes, and the size of the image in it."""
    if "\0" in key or any(mark in key for mark in "\t\r\n"):
        raise BadRow("broken key", repr(key))
    try:
        data = _bytes(folder, key)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a damaged disk; a loop of links
        raise BadRow("unreadable image", str(error)) from None
    height, width = decode_image(encode_image(data)).shape[:2]
    return data, {"height": height, "width": width}


def _bytes(folder: Path, key: str) -> bytes:
    """Of an image file below the folder."""
    path = folder / key
    # Names below the folder are taken by their words: it may hold links to other disks.
    elsewhere = Path(key).is_absolute() and not path.resolve().is_relative_to(folder.resolve())
    if elsewhere or ".." in Path(key).parts:
        raise BadRow("image outside of the folder", key)
    if not path.is_file():
        raise BadRow("missing image", str(path))
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise BadRow("image too large", f"{path.stat().st_size} bytes, at most {MAX_IMAGE_BYTES} are read")
    return path.read_bytes()
