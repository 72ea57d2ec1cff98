"""FreiHAND's file of predictions and its scores, against an implementation sample by sample with SciPy."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import cKDTree
from torch import Tensor

from fastmetro import cli
from fastmetro.evaluation import freihand


def samples(count: int = 70, noise: float = 0.01, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions and truth; predictions are rotated, scaled, moved and noisy."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = [0.05 * randn(count, points, 3) for points in (21, 778)]
    found = []
    for points in truth:
        rotation = torch.linalg.qr(torch.eye(3, dtype=torch.float64) + 0.1 * randn(count, 3, 3))[0]
        rotation[count // 2 :, 0] *= -1  # reflections, too
        found.append(1.1 * points @ rotation + 0.01 * randn(count, 1, 3) + noise * randn(*points.shape))
    return found[0], found[1], truth[0], truth[1]


def aligned(points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """With SciPy, of one sample."""
    mean, true_mean = points.mean(0), truth.mean(0)
    points, truth = points - mean, truth - true_mean
    size, true_size = np.linalg.norm(points), np.linalg.norm(truth)
    rotation, scale = orthogonal_procrustes(points / size, truth / true_size)
    return points / size @ rotation * scale * true_size + true_mean


def slow_scores(joints: Tensor, vertices: Tensor, true_joints: Tensor, true_vertices: Tensor) -> dict[str, float]:
    """Point by point, with the thresholds one after the other."""
    found: dict[str, float] = {}
    for name, predicted, truth in (("xyz", joints, true_joints), ("mesh", vertices, true_vertices)):
        for infix in ("", "_al"):
            pairs = [(p.numpy(), t.numpy()) for p, t in zip(predicted, truth, strict=True)]
            if infix:
                pairs = [(aligned(p, t), t) for p, t in pairs]
            errors = np.stack([np.linalg.norm(p - t, axis=1) for p, t in pairs])
            found[f"{name}{infix}_mean3d"] = 100 * errors.mean()
            thresholds = np.linspace(0, 0.05, 100)
            curve = [(errors <= threshold).mean() for threshold in thresholds]
            found[f"{name}{infix}_auc3d"] = float(np.trapezoid(curve, thresholds) / 0.05)
            if name == "mesh":
                for label, threshold in (("5", 0.005), ("15", 0.015)):
                    values = []
                    for p, t in pairs:
                        precision, recall = ((cKDTree(b).query(a)[0] < threshold).mean() for a, b in ((p, t), (t, p)))
                        both = precision + recall
                        values.append(2 * precision * recall / both if both else 0.0)
                    found[f"f{infix}_score_{label}"] = float(np.mean(values))
    return found


def test_scores_are_those_of_each_sample_alone() -> None:
    given = samples()
    expected, found = slow_scores(*given), freihand.score(*given)
    assert set(found) == set(expected) and len(found) == 12
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_known_cases() -> None:
    joints, vertices, true_joints, true_vertices = samples(3, noise=0.0)
    exact = freihand.score(true_joints, true_vertices, true_joints, true_vertices)
    assert exact["xyz_mean3d"] == exact["mesh_mean3d"] == 0.0
    assert exact["f_score_5"] == exact["f_al_score_15"] == exact["xyz_auc3d"] == 1.0
    similar = freihand.score(joints, vertices, true_joints, true_vertices)
    # Roundings are more than the first threshold, which is 0: half of one step of 99 is lost.
    assert similar["xyz_al_mean3d"] < 1e-12 and similar["mesh_al_auc3d"] == pytest.approx(1 - 0.5 / 99, abs=1e-3)
    assert similar["xyz_mean3d"] > 1.0
    moved = true_joints + torch.tensor([0.02, 0.0, 0.0])
    assert freihand.score(moved, true_vertices, true_joints, true_vertices)["xyz_mean3d"] == pytest.approx(2.0)
    far = freihand.score(true_joints, true_vertices + 9, true_joints, true_vertices)
    assert far["f_score_15"] == 0.0 and far["mesh_auc3d"] == 0.0


def test_points_that_coincide_are_moved_to_the_truth() -> None:
    _, _, true_joints, true_vertices = samples(2)
    found = freihand.score(torch.zeros(2, 21, 3), torch.zeros(2, 778, 3), true_joints, true_vertices)
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("name", ["pred.json", "pred.zip"])
def test_predictions_come_back(tmp_path: Path, name: str) -> None:
    joints, vertices, _, _ = samples(5)
    batches = [(joints[:2].float(), vertices[:2].float()), (joints[2:], vertices[2:])]
    assert freihand.write_predictions(tmp_path / name, batches) == 5
    found = freihand.read_predictions(tmp_path / name)
    torch.testing.assert_close(found[0], joints, rtol=0, atol=1e-7)
    torch.testing.assert_close(found[1], vertices, rtol=0, atol=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_file_is_the_list_that_the_server_expects(tmp_path: Path) -> None:
    joints, vertices, _, _ = samples(2)
    freihand.write_predictions(tmp_path / "pred.zip", [(joints, vertices)])
    with zipfile.ZipFile(tmp_path / "pred.zip") as archive:
        content = json.loads(archive.read("pred.json"))
    assert len(content) == 2 and np.shape(content[0]) == (2, 21, 3) and np.shape(content[1]) == (2, 778, 3)
    freihand.write_predictions(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text()) == [[], []]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    joints, vertices, _, _ = samples(2)
    path = tmp_path / "pred.json"
    path.write_text("before")
    with pytest.raises(ValueError, match=r"joints of batch 0 must be \[N, 21, 3\], got \[2, 20, 3\]"):
        freihand.write_predictions(path, [(joints[:, 1:], vertices)])
    with pytest.raises(ValueError, match="vertices of batch 1 must be finite"):
        freihand.write_predictions(path, [(joints, vertices), (joints, vertices / 0)])
    with pytest.raises(ValueError, match=r"must end in \.json or \.zip"):
        freihand.write_predictions(tmp_path / "pred.txt", [])
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        ("{}", "a list of joints and vertices"),
        ("[[], [], []]", "a list of joints and vertices"),
        ("[[[1]], []]", r"joints must be \[N, 21, 3\], got \[1, 1\]"),
        ('[["a"], []]', r"joints must be \[N, 21, 3\] numbers"),
    ],
)
def test_files_that_are_no_predictions(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pred.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        freihand.read_predictions(tmp_path / "pred.json")


def test_archives_that_are_no_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("other.json", "[]")
    with pytest.raises(ValueError, match=r"must hold pred\.json, got \['other\.json'\]"):
        freihand.read_predictions(tmp_path / "other.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        freihand.read_predictions(tmp_path / "broken.zip")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        freihand.read_predictions(tmp_path / "no.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pred.json", "[" * 10_000)
    monkeypatch.setattr(freihand, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="holds 10000 bytes, at most 1000 are read"):
        freihand.read_predictions(tmp_path / "bomb.zip")


def test_samples_that_do_not_match() -> None:
    joints, vertices, true_joints, true_vertices = samples(3)
    with pytest.raises(ValueError, match="true_vertices must have as many samples as joints, one at least, got 2"):
        freihand.score(joints, vertices, true_joints, true_vertices[:2])
    with pytest.raises(ValueError, match="one at least, got 0"):
        freihand.score(joints[:0], vertices[:0], true_joints[:0], true_vertices[:0])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joints, vertices, true_joints, true_vertices = samples(4)
    freihand.write_predictions(tmp_path / "pred.zip", [(joints, vertices)])
    for name, points in (("evaluation_xyz.json", true_joints), ("evaluation_verts.json", true_vertices)):
        (tmp_path / name).write_text(json.dumps(points.tolist()))
    arguments = ["--truth", str(tmp_path), "--out", str(tmp_path / "s.txt")]
    assert cli.main(["score", str(tmp_path / "pred.zip"), *arguments]) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "s.txt").read_text()
    expected = freihand.score(joints, vertices, true_joints, true_vertices)
    assert "FreiHAND" in printed and f"xyz_al_mean3d: {expected['xyz_al_mean3d']:.6f}" in written
    assert len(written.splitlines()) == 12
    assert cli.main(["score", str(tmp_path / "no.zip"), "--truth", str(tmp_path)]) == 1
