"""Benchmarks that compare whole trainings, at a size that says nothing."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from bench import ablation, curves, runs, scaling

TINY = ["--model", "fastmetro-compact", "--backbone", "compact", "--batch", "2", "--steps", "2", "--image-size", "32",
        "--device", "cpu"]  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ablation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, logs = tmp_path / "ablation.csv", tmp_path / "curves.csv"
    arguments = ["--csv", str(path), "--curves", str(logs), "--output", str(tmp_path / "runs"), "--eval-count", "2"]
    ablation.main([*TINY, *arguments, "--variants", "full", "learned-upsampling", "--seeds", "3", "--jobs", "2"])
    full, learned = table(path)
    assert (full["variant"], full["seed"], full["status"], full["steps"]) == ("full", "3", "ok", "2")
    assert int(learned["parameters"]) > int(full["parameters"])
    assert all(float(row[name]) > 0 for row in (full, learned) for name in ablation.ERRORS)
    assert {row["run"] for row in table(logs)} == {"full", "learned-upsampling"}
    curves.main([str(logs), "--values", "loss", "--out", str(tmp_path / "curves.png")])
    assert "minus full" in capsys.readouterr().out


def test_rows_of_an_ablation_replace_those_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "ablation.csv"
    empty = dict.fromkeys(ablation.COLUMNS, "")
    rows = [{**empty, "variant": name, "seed": seed, "steps": 5} for name in ("full", "no-mask") for seed in (0, 1)]
    ablation.write_rows(path, rows)
    ablation.write_rows(path, [{**empty, "variant": "no-mask", "seed": 0, "steps": 6}])
    found = [(row["variant"], row["seed"], row["steps"]) for row in table(path)]
    assert found == [("full", "0", "5"), ("full", "1", "5"), ("no-mask", "1", "5"), ("no-mask", "0", "6")]


def test_steps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 60.0, 0.0, 60.0])
    monkeypatch.setattr(ablation.time, "monotonic", lambda: next(clock))
    trial = [{"status": "ok", "variant": "full", "images_per_second": "64"}]
    monkeypatch.setattr(ablation, "execute_all", lambda options, wanted, steps: trial * len(wanted))
    options = argparse.Namespace(jobs=3, trial=100, batch=32, seconds=1060.0)
    wanted = [(name, seed) for seed in range(3) for name in ablation.DEFAULT]
    # Half a second a step, so 10 s around the 100 of the trial; a third of 1,000 s for each run of three at once.
    assert ablation.steps_that_fit(options, wanted) == int((ablation._PLANNED * 1000 / 3 - 10) / 0.5)
    options.seconds = 100.0
    with pytest.raises(ValueError, match="--seconds 100 is too little for 9 runs"):
        ablation.steps_that_fit(options, wanted)


def test_scaling(tmp_path: Path) -> None:
    path, logs = tmp_path / "scaling.csv", tmp_path / "curves.csv"
    # Two images for each process: the deepest batch norms see one position of each.
    scaling.main([*TINY, "--batch", "4", "--csv", str(path), "--curves", str(logs), "--output", str(tmp_path / "runs")])
    rows = table(path)
    assert [(row["part"], row["processes"], row["batch"]) for row in rows] == [
        ("curve", "1", "4"), ("curve", "1", "4"), ("curve", "2", "4"),
        ("speed", "1", "4"), ("speed", "2", "8"), ("speed", "2", "4"),
    ]  # fmt: skip
    assert all(row["status"] == "ok" for row in rows)
    assert float(rows[0]["loss_difference"]) == 0 and float(rows[1]["loss_difference"]) < 1e-3
    assert float(rows[3]["times_one"]) == 1 and float(rows[4]["times_one"]) > 0
    assert {row["run"] for row in table(logs)} == {"one", "one again", "2 processes"}
    with pytest.raises(SystemExit, match="divide --batch, got 2 and 3"):
        scaling.main(["--batch", "3"])


def test_logs_of_different_steps_are_not_compared() -> None:
    one = [{"step": "1", "loss": "2.0"}, {"step": "2", "loss": "1.0"}]
    assert scaling.loss_difference(one, [{"step": "1", "loss": "2.0"}, {"step": "2", "loss": "1.1"}]) == pytest.approx(
        0.1
    )
    with pytest.raises(ValueError, match="different steps: 2 and 1 rows"):
        scaling.loss_difference(one, one[:1])


def test_what_fails_says_why(tmp_path: Path) -> None:
    run = runs.Run(tmp_path / "run", ["--device", "cpu", "--learning-rate", "-1"])
    assert "learning_rate must be positive" in runs.execute(run)
    run = runs.Run(tmp_path / "run", ["--device", "cpu", "--steps", "1"])
    assert runs.execute(run, 0.05) == "not finished after 0.05 s"
    assert runs.log_rows(run.folder) == []


def test_the_error_is_found_before_the_report_of_torchrun() -> None:
    report = (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n  error_file: <N/A>\n  traceback : To see"
    )
    assert (
        runs._reason(f"[rank1]: ValueError: too few values\n{report}\n======\n")
        == "[rank1]: ValueError: too few values"
    )
    assert runs._reason("error: no such file\n" + report) == "error: no such file"
    assert runs._reason("Killed\n") == "Killed" and runs._reason("") == "nothing was printed"
