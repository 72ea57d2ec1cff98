"""`fastmetro eval --male-model ... --female-model ...`: whose models made the true vertices."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_tsv_evaluation import body_model, data_set, made_up_mesh, predict

from fastmetro.cli import main
from fastmetro.evaluation import command
from fastmetro.evaluation.settings import EvalSettings
from fastmetro.inference.pretrained import NetworkChoice
from fastmetro.models.config import FastMETROConfig


class _Body(torch.nn.Module):
    """A network of SMPL's mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.mesh = FastMETROConfig(), made_up_mesh("smpl")

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pred_3d_vertices_fine": predict(images)}


def test_the_report_tells_whose_models_made_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of samples with parameters; the one "male" row has none."""
    monkeypatch.setattr(command, "load_network", lambda settings: _Body())
    data_set(tmp_path / "data", genders=("female", "none", "female", "male"))
    body_model("smpl", tmp_path)
    model = str(tmp_path / "smpl.pkl")
    arguments = ["eval", "--device", "cpu", "--data", str(tmp_path / "data" / "train.yaml"), "--protocol", "3dpw",
                 "--csv", str(tmp_path / "eval.csv"), "--body-model", model]  # fmt: skip
    assert main([*arguments, "--male-model", model, "--female-model", model]) == 0
    line = "true vertices by the model of each sample's gender (neutral without): female 4, neutral 2"
    assert line in capsys.readouterr().out.splitlines()
    assert main(arguments) == 0 and "each sample's gender" not in capsys.readouterr().out


def test_gendered_models_are_not_ignored() -> None:
    """Human3.6M needs no body model, and would be measured without these."""
    with pytest.raises(ValueError, match="male_model and female_model need body_model"):
        EvalSettings(data="x.yaml", protocol="h36m-p2", male_model=Path("m.pkl"), female_model=Path("f.pkl"))


@pytest.mark.parametrize(
    "name", [field.name for field in (*fields(EvalSettings), *fields(NetworkChoice)) if field.name != "network"]
)
def test_the_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind its name and type, before the default."""
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    printed = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    (text,) = re.findall(rf" --{name.replace('_', '-')},? \S+ (.*?)\(default: ", printed)
    assert len(re.findall("[a-z]{2,}", text)) > 2
