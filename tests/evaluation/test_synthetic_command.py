"""`fastmetro eval` on synthetic people: a protocol like the others, in the table, by any number of processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from test_several_processes import run_processes

from fastmetro.cli import main
from fastmetro.evaluation.settings import EvalSettings
from fastmetro.evaluation.synthetic import evaluate_synthetic
from fastmetro.inference.pretrained import load_pretrained
from fastmetro.training.export import export_weights


def run_main(rank: int, arguments: list[str]) -> None:
    assert main(arguments) == 0


def test_two_processes_give_the_row_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five images in batches of two: one process has a batch more than the other, and one batch is smaller."""
    arguments = ["eval", "--count", "5", "--batch-size", "2", "--device", "cpu", "--csv", str(tmp_path / "eval.csv")]
    run_processes(run_main, 2, arguments)
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("synthetic:")
    with (tmp_path / "eval.csv").open() as file:
        two, one = csv.DictReader(file)
    assert (two["processes"], one["processes"]) == ("2", "1")
    for row in (two, one):
        assert (row["protocol"], row["data"], row["count"], row["pa_mpvpe"]) == ("synthetic", "synthetic", "5", "")
    assert [two[name] for name in ("mpjpe", "pa_mpjpe", "mpvpe")] == [
        one[name] for name in ("mpjpe", "pa_mpjpe", "mpvpe")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "3dpw"}, "protocol must be 'synthetic' for data 'synthetic', got '3dpw'"),
        ({"compat": "published"}, "compat is of TSV data sets"),
        ({"male_model": Path("m"), "female_model": Path("f")}, "male_model is of TSV data sets"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSettings(**options)


def test_a_table_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastmetro.evaluation.command.evaluate_synthetic", lambda *a, **k: pytest.fail("too late"))
    assert main(["eval", "--count", "2", "--csv", str(tmp_path)]) == 1
    assert "csv must be a file" in capsys.readouterr().err


def test_images_are_as_large_as_in_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.safetensors"
    record = {"model": "fastmetro-compact", "mesh": "anny-body", "config": {"image_size": 64}}
    export_weights(load_pretrained("fastmetro-compact"), weights, record)
    sizes = []

    def measured(*arguments: object, size: int, **options: object) -> dict[str, object]:
        sizes.append(size)
        return evaluate_synthetic(*arguments, size=size, **options)

    monkeypatch.setattr("fastmetro.evaluation.command.evaluate_synthetic", measured)
    common = ["eval", "--count", "1", "--device", "cpu", "--csv", str(tmp_path / "eval.csv")]
    assert main([*common, "--checkpoint", str(weights)]) == main(common) == 0
    assert sizes == [64, 224]
