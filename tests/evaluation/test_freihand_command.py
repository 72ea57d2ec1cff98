"""`fastmetro eval --protocol freihand`: checks before the network, predictions and scores of all rows or none."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from test_tsv_evaluation import data_set

from fastmetro.cli import main
from fastmetro.evaluation import command, freihand
from fastmetro.evaluation.results import COLUMNS
from fastmetro.evaluation.settings import EvalSettings
from fastmetro.meshes.mesh import HAND_21, Mesh, MeshLevel
from fastmetro.models.config import FastMETROConfig

ROWS = 5


class Network(torch.nn.Module):
    """Hands that depend on the image, of a mesh with as many vertices as MANO's."""

    def __init__(self) -> None:
        super().__init__()
        dense = np.random.default_rng(1).dirichlet(np.ones(freihand.VERTICES), freihand.JOINTS)
        level = MeshLevel(None, None, np.zeros((0, 2), np.int64), np.arange(freihand.VERTICES))
        regressor = sp.csr_matrix(dense.astype(np.float32))
        self.config = FastMETROConfig()
        self.mesh = Mesh("made-up", "hand", (level,), (), HAND_21, regressor, (0,), {})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seeds = (images.double().mean((1, 2, 3)) * 1e4).round().long()
        hands = [torch.randn(778, 3, generator=torch.Generator().manual_seed(int(s) % 2**31)) for s in seeds]
        return {"pred_3d_vertices_fine": 0.05 * torch.stack(hands)}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[EvalSettings]:
    """Puts the network above in place of one from a checkpoint; the settings of every time that one was loaded."""
    calls: list[EvalSettings] = []

    def load(settings: EvalSettings) -> Network:
        calls.append(settings)
        return Network()

    monkeypatch.setattr(command, "load_network", load)
    return calls


def truth(folder: Path, joints: int = ROWS, vertices: int = ROWS) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for path, shape in zip(freihand.truth_files(folder), ((joints, 21, 3), (vertices, 778, 3)), strict=True):
        path.write_text(json.dumps((0.05 * generator.normal(size=shape)).tolist()))
    return folder


def evaluate(folder: Path, *options: object, bad: tuple[int, ...] = ()) -> int:
    data_set(folder / "data", "hand", ROWS, bad)
    arguments = ["--data", folder / "data" / "train.yaml", "--protocol", "freihand", "--csv", folder / "eval.csv"]
    return main(["eval", "--device", "cpu", *map(str, [*arguments, *options])])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def test_scores_by_the_truth_are_recorded(
    tmp_path: Path, loaded: list[EvalSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    official, pred = truth(tmp_path / "truth"), tmp_path / "new" / "pred.zip"
    assert evaluate(tmp_path, "--predictions", pred, "--truth", official) == 0
    printed, (row,) = capsys.readouterr().out, table(tmp_path)
    scores = freihand.score(*freihand.read_predictions(pred), *freihand.read_truth(*freihand.truth_files(official)))
    columns = {
        "pa_mpjpe": 10 * scores["xyz_al_mean3d"], "pa_mpvpe": 10 * scores["mesh_al_mean3d"],
        "auc": scores["xyz_al_auc3d"], "auc_mesh": scores["mesh_al_auc3d"], "f5": scores["f_al_score_5"],
        "f15": scores["f_al_score_15"],
    }  # fmt: skip
    assert tuple(row) == COLUMNS and row["mpjpe"] == row["mpvpe"] == "" and row["count"] == "5"
    for name, value in columns.items():
        assert float(row[name]) == pytest.approx(value, abs=6e-5), name
        assert value > 0, name
    assert f"PA-MPJPE {columns['pa_mpjpe']:.2f}   PA-MPVPE {columns['pa_mpvpe']:.2f}   mm" in printed
    assert f"5 predictions in {pred}" in printed and "f_al_score_15: " in printed


def test_without_truth_no_errors_are_recorded(
    tmp_path: Path, loaded: list[EvalSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the labels would be of dummies; they are not printed either."""
    assert evaluate(tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("freihand: no errors without --truth\n5 samples of") and "PA-MPJPE 1" not in printed
    (row,) = table(tmp_path)
    numbers = ("mpjpe", "pa_mpjpe", "mpvpe", "pa_mpvpe", "auc", "auc_mesh", "f5", "f15")
    assert all(row[name] == "" for name in numbers) and row["count"] == "5"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_cannot_be_used_is_no_shift(
    tmp_path: Path, loaded: list[EvalSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--predictions", tmp_path / "pred.zip"], ["--truth", truth(tmp_path / "truth")]):
        assert evaluate(tmp_path, *options, bad=(1, 3)) == 1
        assert "2 of 5 could not be used: 1, 3 (broken base64: 2)" in capsys.readouterr().err
    assert not (tmp_path / "pred.zip").exists() and not (tmp_path / "eval.csv").exists()
    assert evaluate(tmp_path, bad=(1, 3)) == 0 and table(tmp_path)[0]["skipped"] == "2"


def test_what_cannot_work_is_found_before_the_network_is_loaded(
    tmp_path: Path, loaded: list[EvalSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    good, few, uneven = truth(tmp_path / "good"), truth(tmp_path / "few", 4, 4), truth(tmp_path / "uneven", 5, 4)
    broken = truth(tmp_path / "broken")
    (broken / "evaluation_verts.json").write_text("[[[")
    (tmp_path / "file").write_text("x")
    joints = good / "evaluation_xyz.json"
    for options, message in (
        (["--predictions", "pred.txt"], "predictions must end in .json or .zip, got 'pred.txt'"),
        (["--predictions", tmp_path / "file" / "pred.zip"], f"{tmp_path / 'file'} is a file"),
        (["--predictions", joints, "--truth", good], f"predictions must be another file than {joints}"),
        (["--truth", tmp_path / "nowhere"], "nowhere/evaluation_xyz.json' does not exist"),
        (["--truth", broken], "broken/evaluation_verts.json cannot be read"),
        (["--truth", few], f"truth {few} has 4 samples, {tmp_path}/data/train.yaml has 5 rows"),
        (["--truth", uneven], "must have as many samples each, got 5 and 4"),
    ):
        assert evaluate(tmp_path, *options) == 1
        assert message in capsys.readouterr().err, options
    assert not loaded and not (tmp_path / "eval.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": Path("p.zip"), "count": 3}, "all rows and do not go with count, got 3"),
        ({"truth": Path("truth"), "count": 3}, "all rows and do not go with count, got 3"),
        ({"truth": Path("truth"), "data": "synthetic"}, "go with a TSV data set, got data 'synthetic'"),
        ({"truth": Path("truth"), "protocol": "3dpw"}, "go with protocol 'freihand', got '3dpw'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSettings(**({"data": "a.yaml", "protocol": "freihand"} | options))  # type: ignore[arg-type]


def test_a_reader_that_stops_costs_no_files(
    tmp_path: Path, loaded: list[EvalSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stdout", Closed())
    assert evaluate(tmp_path, "--predictions", tmp_path / "pred.zip") == 1
    assert len(table(tmp_path)) == 1 and (tmp_path / "pred.zip").is_file()
