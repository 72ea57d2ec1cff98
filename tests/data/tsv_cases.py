"""A small data set in the published format, written for a test."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastmetro.data.tsv import TsvWriter
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.rows import encode_image


def jpeg(height: int = 40, width: int = 30, seed: int = 0) -> bytes:
    """A file with smooth colours."""
    ramp = np.linspace(0, 255, height * width).reshape(height, width) + seed
    pixels = np.stack([ramp, ramp[::-1], ramp.T.reshape(height, width)], axis=-1) % 256
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def damaged_jpeg() -> bytes:
    """A file whose lower half is missing, with an end behind what is left: decoders fill up with grey."""
    whole = jpeg()
    return whole[: len(whole) * 3 // 4] + b"\xff\xd9"


def label(joint_count: int = 24, pose_count: int = 72, **changed: Any) -> dict[str, Any]:
    """A label with different numbers everywhere."""
    count = np.arange(joint_count)
    return {
        "center": [15.0, 20.0],
        "scale": 0.2,
        "2d_joints": np.stack([count, count + 0.5, count % 2], 1).tolist(),
        "3d_joints": [np.stack([count / 100, -count / 50, count / 25, count % 2], 1).tolist()],
        "pose": (np.arange(pose_count) / 100).tolist(),
        "betas": (np.arange(10) / 10).tolist(),
        "has_2d_joints": 1,
        "has_3d_joints": 1,
        "has_smpl": 0,
        "gender": "female",
    } | changed


def cell(content: dict[str, Any]) -> str:
    """The JSON of a label."""
    return json.dumps([content])


Rows = list[tuple[str, bytes, str, str]]
"""Key, image cell, label cell and size cell of each row."""


def rows(count: int = 3, name: str = "im") -> Rows:
    """Usable rows."""
    size = json.dumps([{"height": 40, "width": 30}])
    return [
        (f"{name}{i}", encode_image(jpeg(seed=i)), cell(label(scale=0.2 + i)), size if i % 2 else "40 30")
        for i in range(count)
    ]


def write_tables(folder: Path, content: Rows, stem: str = "train") -> dict[str, str]:
    """The three files of some rows; their names by table."""
    names = {table: f"{stem}.{table}.tsv" for table in ("img", "label", "hw")}
    for number, table in enumerate(names, start=1):
        with TsvWriter(folder / names[table]) as writer:
            for row in content:
                writer.write([row[0], row[number]])
    return names


def good(count: int, start: int = 0) -> Rows:
    """Usable rows with an image and a box of their own each."""
    return [
        (f"im{i}", encode_image(jpeg(40 + i % 3, 30, 31 * i)), cell(label(scale=0.1 + 0.01 * i)), f"{40 + i % 3} 30")
        for i in range(start, start + count)
    ]


def write_set(folder: Path, content: Rows, **further: str) -> Path:
    """A single set and its YAML file."""
    names = write_tables(folder, content) | further
    path = folder / "train.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in names.items() if value))
    return path


def assert_equal(actual: TsvBatch, expected: TsvBatch, tolerance: float = 0.0) -> None:
    """All that a batch holds; images within a tolerance."""
    for name, value in vars(expected).items():
        other = getattr(actual, name)
        if isinstance(value, torch.Tensor):
            bound = tolerance if name == "images" else 0.0
            torch.testing.assert_close(other.cpu(), value, rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert other == value, name
