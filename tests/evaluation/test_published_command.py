"""`fastmetro eval --compat published`: batch size and number of processes of its own where none are given."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from test_several_processes import run_processes
from test_tsv_evaluation import data_set, made_up_mesh, predict

from fastmetro.cli import main
from fastmetro.compat import Compat
from fastmetro.data.tsv.dataset import TsvDataset, TsvSample
from fastmetro.evaluation import command
from fastmetro.evaluation.settings import EvalSettings
from fastmetro.inference.pretrained import NetworkChoice
from fastmetro.models import FastMETRO
from fastmetro.models.config import FastMETROConfig


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


def test_a_network_gets_the_crops_of_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default and with compat those of such a data set."""
    seen: list[torch.Tensor] = []

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.mesh = FastMETROConfig(), made_up_mesh("smpl")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return predict(images)

    monkeypatch.setattr(command, "load_network", lambda settings: Body())
    monkeypatch.setattr(command, "trained_size", lambda checkpoint: 32)
    source = data_set(tmp_path / "data", count=3)
    arguments = ["eval", "--device", "cpu", "--data", str(source.path), "--csv", str(tmp_path / "eval.csv")]
    for options in ([], ["--compat", "published"]):
        assert main([*arguments, *options]) == 0
    crops: list[torch.Tensor] = []
    modes: tuple[Compat | None, ...] = (None, "published")
    for compat in modes:
        samples = [TsvDataset(source, "body", size=32, compat=compat)[row] for row in range(3)]
        crops.append(torch.stack([torch.as_tensor(one.image) for one in samples if isinstance(one, TsvSample)]))
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in zip(seen, crops, strict=True))
    assert not torch.equal(*crops)


@pytest.mark.parametrize("compat", [None, "published"])
def test_a_released_network_has_the_rotations_of_the_setting(
    compat: Compat | None, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of ours takes them from its record: see the trainings."""

    def loaded(checkpoint: str, *, model: FastMETRO, attention: str) -> FastMETRO:
        return model

    monkeypatch.setattr(command, "load_pretrained", loaded)
    choice = NetworkChoice("fastmetro-compact", "compact", mesh_data=shared / "data" / "fastmetro", smpl_head=True)
    network = command.load_network(EvalSettings(data="x.yaml", compat=compat, network=choice))
    assert network.config.smpl_compat == network.smpl_parameter_regressor.compat == (compat == "published")
