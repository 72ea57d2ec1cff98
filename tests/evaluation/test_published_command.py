"""`fastmetro eval --compat published`: batch size and number of processes of its own where none are given."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from test_several_processes import run_processes
from test_tsv_evaluation import data_set

from fastmetro.cli import main
from fastmetro.evaluation import command


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def run_main(rank: int, arguments: list[str]) -> None:
    assert main(arguments) == 0


def test_published_means_by_default_those_of_16_images_and_the_processes_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []
    real = command.evaluate_tsv

    def spied(*arguments, **options):
        sizes.append(options["batch_size"])
        return real(*arguments, **options)

    monkeypatch.setattr(command, "evaluate_tsv", spied)
    data_set(tmp_path / "data", count=18)
    arguments = ["eval", "--device", "cpu", "--protocol", "3dpw", "--data", str(tmp_path / "data" / "train.yaml")]
    for options in ([], ["--batch-size", "16"], ["--processes", "3", "--batch-size", "2"]):
        published = ["--compat", "published", "--csv", str(tmp_path / "eval.csv")]
        assert main([*arguments, *published, *options]) == 0
    assert main([*arguments, "--csv", str(tmp_path / "eval.csv")]) == 0
    default, explicit, three, exact = table(tmp_path)
    assert sizes == [16, 16, 2, 32] and default["pa_mpjpe"] == explicit["pa_mpjpe"] != three["pa_mpjpe"]
    assert [row["processes"] for row in (default, explicit, three, exact)] == ["1", "1", "3", "1"]
    assert "plain mean over 3 process(es)" in capsys.readouterr().out


def test_published_means_in_two_processes_are_those_of_two(tmp_path: Path) -> None:
    """As simulated by one; a count that is given is kept."""
    data_set(tmp_path / "data", count=5)
    arguments = ["eval", "--data", str(tmp_path / "data" / "train.yaml"), "--protocol", "3dpw", "--device", "cpu",
                 "--csv", str(tmp_path / "eval.csv"), "--compat", "published"]  # fmt: skip
    run_processes(run_main, 2, arguments)
    run_processes(run_main, 2, [*arguments, "--processes", "1"])
    assert main([*arguments, "--processes", "2"]) == 0
    two, kept, simulated = table(tmp_path)
    assert [row["processes"] for row in (two, kept, simulated)] == ["2", "1", "2"]
    assert two["mpjpe"] == simulated["mpjpe"] != kept["mpjpe"] and two["pa_mpjpe"] == simulated["pa_mpjpe"]
