"""The benchmark of training from disk, and pictures of learning curves."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import crops, curves, data


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    data.main([
        "--workers", "0", "1", "--batch", "2", "--steps", "2", "--rows", "4", "--model", "fastmetro-compact",
        "--device", "cpu", "--csv", str(path),
    ])  # fmt: skip
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pixels"], row["workers"]) for row in rows] == [(p, w) for p in ("worker", "device") for w in "01"]
    for row in rows:  # not how fast: other processes share this machine
        alone, whole = float(row["step_without_data_ms"]), float(row["step_ms"])
        assert float(row["busy"]) == pytest.approx(alone / whole, rel=0.01)
        assert float(row["images_per_second"]) == pytest.approx(2e3 / whole, rel=0.01)
        assert float(row["images_per_second_alone"]) > 0
        waiting, host = float(row["waiting_ms"]), float(row["host_ms"])
        assert waiting > 0 and host > 0 and waiting + host < 1.01 * whole


def test_curves_are_drawn(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,samples,loss,pa_mpjpe\n1,10,3.0,\n2,20,2.0,\n2,20,,90.0\n3,30,1.5,\n3,30,,80.0\n")
    out = tmp_path / "new" / "curves.png"
    curves.main([f"a={log}", f"b={log}", "--out", str(out)])
    assert out.stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no run has 'speed'"):
        curves.main([f"a={log}", "--values", "speed", "--out", str(out)])
    with pytest.raises(SystemExit, match="is the log of one run: give it a name"):
        curves.main([str(log)])
    with pytest.raises(SystemExit, match="expected NAME=FILE"):
        curves.main([f"a={tmp_path / 'absent.csv'}"])


def test_logs_of_several_runs_are_one_file(tmp_path: Path) -> None:
    log, kept = tmp_path / "log.csv", tmp_path / "kept.csv"
    log.write_text("step,samples,loss\n1,10,3.0\n2,20,2.0\n")
    curves.main([f"a={log}", f"b={log}", f"a={log}", "--values", "loss", "--out", str(tmp_path / "a.png"),
                 "--csv", str(kept)])  # fmt: skip
    found = curves.read_curves(str(kept))
    assert [(name, len(rows)) for name, rows in found] == [("a", 2), ("b", 2), ("a", 2)]


def test_crops(tmp_path: Path) -> None:
    path = tmp_path / "crops.csv"
    crops.main(["--batch", "2", "--rounds", "1", "--device", "cpu", "--csv", str(path)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["compat"], row["contender"]) for row in rows] == [
        (compat, name) for compat in ("", "published") for name in ("pytorch", "ours")
    ]
    assert all(float(row["us"]) > 0 and float(row["largest_difference"]) < 1e-4 for row in rows)
