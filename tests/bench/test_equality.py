"""The comparison of engines with their network: what counts, and a run on a few images."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import equality
from fastmetro.profiling.latency import tensor_float_32


def test_distances_and_limits() -> None:
    expected = {equality.MESH: torch.zeros(2, 4, 3), "pred_cam": torch.zeros(2, 3)}
    outputs = {name: value.clone() for name, value in expected.items()}
    outputs[equality.MESH][0, 1] = torch.tensor([0.0, 3e-3, 4e-3])
    one = equality.Distance("engine", "float16")
    one.add(outputs, expected)
    assert one.mean_mm == pytest.approx(5 / 8) and one.largest_mm == pytest.approx(5)
    assert one.largest_coordinate == pytest.approx(4e-3) and not one.within
    one.add(expected, expected)
    assert one.mean_mm == pytest.approx(5 / 16) and not one.within  # the largest still is
    assert equality.Distance("engine", "bfloat16", 4.9, 10, 2.9).within
    assert not equality.Distance("engine", "bfloat16", 5.1, 10, 2.9).within
    assert equality.Distance("engine", "float32", largest_coordinate=1e-5).within
    for name in expected:
        outputs = {key: value.clone() for key, value in expected.items()}
        outputs[name][0] = torch.nan
        for dtype in ("float32", "float16") if name == equality.MESH else ("float32",):
            one = equality.Distance("engine", dtype)
            one.add(outputs, expected)
            one.add(expected, expected)
            assert not one.within


def test_float32_engine_over_images(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    equality.main(["--count", "3", "--batch", "2", "--dtype", "float32", "--device", "cpu", "--csv", str(path)])
    with path.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["contender"] == "engine" and row["dtype"] == "float32"
    assert row["within"] == "True" and row["images"] == "3" and float(row["mean_mm"]) < 1e-2


def test_engine_beside_the_network_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: engines are compiled without TF32, as the network runs."""
    seen = []
    compiled = equality.fastmetro.compile

    def compile(*arguments: Any) -> Any:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return compiled(*arguments)

    monkeypatch.setattr(equality.fastmetro, "compile", compile)
    with tensor_float_32(True):
        engine, plain, autocast = equality.measure(2, 2, ["bfloat16"], torch.device("cpu"))
    assert seen == [(False, False)]
    assert [one.contender for one in (engine, plain, autocast)] == ["engine", "plain", "autocast"]
    for one in (engine, plain, autocast):
        assert one.dtype == "bfloat16" and 1e-2 < one.mean_mm < 20
    assert engine.mean_mm < 2 * min(plain.mean_mm, autocast.mean_mm)
