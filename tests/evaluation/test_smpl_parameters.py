"""The row of `fastmetro eval` that a network's SMPL parameters get."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_tsv_evaluation import body_model, data_set, made_up_mesh, predict

from fastmetro.cli import main
from fastmetro.data.tsv import TsvSource
from fastmetro.evaluation import command
from fastmetro.models.config import FastMETROConfig


class _Parameters(torch.nn.Module):
    """A network whose mesh is anything and whose parameters are those of the rows, in their order."""

    def __init__(self, source: TsvSource) -> None:
        super().__init__()
        self.config, self.mesh = FastMETROConfig(smpl_head=True), made_up_mesh("smpl")
        labels = [json.loads(source.row(row).label)[0] for row in range(len(source))]
        pose = np.array([label["pose"] for label in labels]).reshape(-1, 3)
        self.rotations = torch.from_numpy(Rotation.from_rotvec(pose).as_matrix().reshape(len(labels), 24, 3, 3))
        self.betas = torch.tensor([label["betas"] for label in labels])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert len(images) == len(self.betas)
        outputs = {"pred_rotmat": self.rotations, "pred_betas": self.betas}
        return outputs | {"pred_3d_vertices_fine": predict(images)}


def test_true_parameters_have_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vertices: the joints of these rows are not those of their bodies."""
    source = data_set(tmp_path / "data")
    monkeypatch.setattr(command, "load_network", lambda settings: _Parameters(source))
    monkeypatch.setattr(command, "trained_size", lambda checkpoint: 32)
    body_model("smpl", tmp_path)
    arguments = ["eval", "--device", "cpu", "--data", str(source.path), "--protocol", "3dpw"]
    assert main([*arguments, "--body-model", str(tmp_path / "smpl.pkl"), "--csv", str(tmp_path / "eval.csv")]) == 0
    with (tmp_path / "eval.csv").open() as file:
        mesh, parameters = csv.DictReader(file)
    assert (mesh["protocol"], parameters["protocol"]) == ("3dpw", "3dpw, SMPL parameters")
    for name in ("mpvpe", "pa_mpvpe"):
        assert float(parameters[name]) < 0.01 and float(mesh[name]) > 100, name
