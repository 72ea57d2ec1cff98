"""The roofline picture of the engine's parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import roofline
from fastmetro.profiling.record import Row
from fastmetro.profiling.work import part_work


def row(**changed: str) -> Row:
    usual = {
        "model": "fastmetro-s", "backbone": "resnet50", "mesh": "anny-body", "upsampling": "fixed", "batch": "32",
        "dtype": "float16", "contender": "engine", "scope": "network", "status": "ok", "device": "NVIDIA H200",
        "parts_ms": "backbone 1.0; encoder 0.1; decoder 0.25; upsampling 0.05; after the backbone 0.4",
    }  # fmt: skip
    return usual | changed


def test_points_are_the_engines_parts() -> None:
    rows = [row(contender="tuned"), row(status="wrong"), row(scope="file to file"), row(device="cpu"), row()]
    found = roofline.points(rows)
    assert [(point.network, point.batch, point.part) for point in found] == [
        ("S, resnet50", 32, part) for part in ("backbone", "encoder", "decoder", "upsampling")
    ]
    decoder = found[2]
    assert decoder.speed == pytest.approx(decoder.work.flop / 0.25e-3)
    assert decoder.share == pytest.approx(decoder.speed / 989e12)  # far right of the knee
    upsampling = found[3]
    assert upsampling.share == pytest.approx(upsampling.work.bytes / 4.24e12 / 0.05e-3)
    with pytest.raises(ValueError, match="no row of the engine"):
        roofline.points(rows[:-1])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from fastmetro.models import create_model

    work = part_work(create_model("fastmetro-s", "resnet50"), 1, 2)
    names = ("backbone", "encoder", "decoder", "upsampling")
    networks = ("S, resnet50", "L, resnet50")
    found = [roofline.Point(network, 1, part, work[part], 1e-4) for network in networks for part in names]
    roofline.draw(found, tmp_path / "new" / "roofline.png")
    assert (tmp_path / "new" / "roofline.png").stat().st_size > 10_000
