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
        (f"[[[[{'1' * 400}]]], []]", r"pred\.json: joints must be \[N, 21, 3\] numbers"),
        (f"[[[[{'1' * 5000}]]], []]", r"pred\.json cannot be read: Exceeds the limit"),
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


def _damaged(path: Path, change: dict[int, bytes]) -> Path:
    """An archive with other bytes at some places of its entry, and of the header where the directory repeats that."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pred.json", "[[1.5, 2.5], [3.5]]" * 9)
    content = bytearray(path.read_bytes())
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    for place, value in change.items():
        for start in (local + place, central + place + 2) if place < 30 else (local + place,):
            content[start : start + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({6: b"\x01"}, "is encrypted"),
        ({8: b"\x62"}, "stored or deflated, got compression method 98"),
        ({39: b"\xff\xff\xff"}, "Error -3 while decompressing"),
    ],
    ids=["encrypted", "compression", "stream"],
)
def test_archives_that_cannot_be_unpacked(tmp_path: Path, change: dict[int, bytes], message: str) -> None:
    path = _damaged(tmp_path / "damaged.zip", change)
    with pytest.raises(ValueError, match=rf"damaged\.zip cannot be read: .*{message}"):
        freihand.read_predictions(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        freihand.read_predictions(tmp_path)


def test_truth_of_different_numbers(tmp_path: Path) -> None:
    joints, vertices = freihand.truth_files(tmp_path)
    joints.write_text(json.dumps(np.zeros((3, 21, 3)).tolist()))
    vertices.write_text(json.dumps(np.zeros((2, 778, 3)).tolist()))
    with pytest.raises(ValueError, match=r"evaluation_verts\.json must have as many samples each, got 3 and 2"):
        freihand.read_truth(joints, vertices)


def test_samples_that_do_not_match() -> None:
    joints, vertices, true_joints, true_vertices = samples(3)
    with pytest.raises(ValueError, match="true_vertices must have as many samples as joints, one at least, got 2"):
        freihand.score(joints, vertices, true_joints, true_vertices[:2])
    with pytest.raises(ValueError, match="one at least, got 0"):
        freihand.score(joints[:0], vertices[:0], true_joints[:0], true_vertices[:0])


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A folder with predictions and truth."""
    joints, vertices, *truth = samples(4)
    freihand.write_predictions(tmp_path / "pred.zip", [(joints, vertices)])
    for path, points in zip(freihand.truth_files(tmp_path), truth, strict=True):
        path.write_text(json.dumps(points.tolist()))
    return tmp_path


def score_command(folder: Path, *options: object) -> int:
    return cli.main(["score", *map(str, [folder / "pred.zip", "--truth", folder, *options])])


def test_the_command(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names in the order of the official script, in a folder that is made."""
    assert score_command(scored, "--out", scored / "new" / "s.txt") == 0
    printed, written = capsys.readouterr().out, (scored / "new" / "s.txt").read_text()
    expected = freihand.score(*samples(4))
    assert "FreiHAND" in printed and f"xyz_al_mean3d: {expected['xyz_al_mean3d']:.6f}" in written
    assert [line.split(": ")[0] for line in written.splitlines()] == [
        "xyz_mean3d", "xyz_auc3d", "xyz_al_mean3d", "xyz_al_auc3d",
        "mesh_mean3d", "mesh_auc3d", "mesh_al_mean3d", "mesh_al_auc3d",
        "f_score_5", "f_al_score_5", "f_score_15", "f_al_score_15",
    ]  # fmt: skip
    assert cli.main(["score", str(scored / "no.zip"), "--truth", str(scored)]) == 1


def test_a_place_for_scores_is_checked_first(
    scored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (scored / "pred.zip").read_bytes()
    monkeypatch.setattr(freihand, "score", lambda *_: pytest.fail("scored before the check"))
    for out, message in (
        (scored / "pred.zip", "out must be another file than"),
        (scored / "evaluation_xyz.json", "out must be another file than"),
        (scored, "out must be a file, got the folder"),
        (scored / "pred.zip" / "s.txt", "pred.zip is a file"),
    ):
        assert score_command(scored, "--out", out) == 1
        assert message in capsys.readouterr().err
    assert (scored / "pred.zip").read_bytes() == before


def test_scores_that_could_not_be_written_leave_those_before(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = scored / "s.txt", Path.write_text
    out.write_text("before")

    def full(path: Path, text: str, **options: str) -> int:
        write(path, text[:3], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert score_command(scored, "--out", out) == 1
    assert out.read_text() == "before" and len(list(scored.iterdir())) == 4
