import json
from pathlib import Path

import pytest
import torch

from fastmetro.data.synthetic.dataset import SyntheticPeople
from fastmetro.evaluation import synthetic
from fastmetro.meshes.mesh import load_mesh
from fastmetro.training.config import TrainConfig
from fastmetro.training.loop import train

SIZE = 32


@pytest.fixture(scope="module")
def mesh():
    return load_mesh("anny-body")


@pytest.fixture(scope="module")
def people(mesh):
    return SyntheticPeople(mesh, seed=5, size=SIZE, photographs=False)


def test_the_truth_has_no_error_and_moved_truth_none_after_alignment(people):
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turn = turn * torch.linalg.det(turn)
    exact = synthetic.evaluate_vertices(lambda _, labels: labels.vertices, people, 4, 3)
    assert max(exact.values()) < 1e-3
    shifted = synthetic.evaluate_vertices(lambda _, labels: labels.vertices + 1, people, 4, 3)
    assert max(shifted.values()) < 1e-2  # both sides are recentred
    turned = synthetic.evaluate_vertices(lambda _, labels: 1.3 * labels.vertices @ turn, people, 4, 3)
    assert turned["pa_mpjpe"] < 1e-2 and turned["mpjpe"] > 100 and turned["mpvpe"] > 100


def test_batches_do_not_change_the_result(people):
    def predict(images, labels):
        return labels.vertices + 0.05 * images.mean(dim=(1, 2, 3)).view(-1, 1, 1) * labels.vertices.flip(1)

    whole, parts = (synthetic.evaluate_vertices(predict, people, 5, size) for size in (5, 2))
    assert whole == pytest.approx(parts, rel=1e-3)
    assert whole["pa_mpjpe"] > 1


def test_predictions_and_counts_that_cannot_be_measured_are_named(people):
    def predict(_, labels):
        vertices = labels.vertices.clone()
        vertices[::2, 0] = torch.inf
        return {"pred_3d_vertices_fine": vertices}

    with pytest.raises(ValueError, match=r"seed 5 must be finite, .* 2 of 3 images of a batch: image 0, image 2$"):
        synthetic.evaluate_vertices(predict, people, 3, 3)
    with pytest.raises(ValueError, match=r"must have shape \[2, \d+, 3\] .*, got \[2, 9, 3\]"):
        synthetic.evaluate_vertices(lambda _, labels: labels.vertices[:, :9], people, 2, 2)
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        synthetic.evaluate_vertices(predict, people, 0, 3)
    with pytest.raises(ValueError, match="at least 1, got 4 and 0"):
        synthetic.mean_meshes(people, 4, 0)


def test_mean_meshes(mesh, people):
    means = synthetic.mean_meshes(people, count=24, batch_size=10)
    labels = people.labels(torch.arange(24))
    torch.testing.assert_close(means.camera, labels.vertices.mean(dim=0), atol=1e-5, rtol=0)
    height = means.facing[:, 1].max() - means.facing[:, 1].min()
    assert 1.0 < height < 2.2  # facing bodies keep their shape, and hang with the head up: y points down
    joints = people.joint_regressor @ means.facing
    assert joints[mesh.joint_names.index("Head"), 1] < -0.3
    assert joints[mesh.joint_names.index("L_Hip"), 0] > 0.05  # its left is on the viewer's right


def test_report_of_the_baselines_alone(mesh, monkeypatch):
    monkeypatch.setattr(synthetic, "MEAN_MESH_SAMPLES", 8)
    monkeypatch.setattr(synthetic.mean_meshes, "__defaults__", (16, 8))
    report = synthetic.evaluate_synthetic(None, count=6, mesh=mesh, photographs=False, size=SIZE)
    assert "mpjpe" not in report and report["count"] == 6 and report["seed"] == synthetic.HELD_OUT_SEED
    assert 50 < report["mean_mesh_facing"]["pa_mpjpe"] < 300
    text = synthetic.format_report(report)
    assert "mean mesh, facing" in text and synthetic.SYNTHETIC_PROTOCOL in text and "network" not in text


def test_training_images_are_not_held_out(mesh, tmp_path):
    with pytest.raises(ValueError, match="training seed"):
        synthetic.evaluate_synthetic(None, seed=3, training_seed=3, mesh=mesh)
    with pytest.raises(ValueError, match="at least 1"):
        synthetic.evaluate_synthetic(None, count=0, mesh=mesh)
    with pytest.raises(ValueError, match="held-out"):
        train(TrainConfig(output=tmp_path, seed=synthetic.HELD_OUT_SEED))


def test_train_stop_resume_and_report(tmp_path, monkeypatch, device):
    """The whole way on real images, tiny: what is exported is what is measured."""
    from safetensors import safe_open

    monkeypatch.setattr(synthetic.mean_meshes, "__defaults__", (8, 8))
    common = {"output": tmp_path / "run", "batch_size": 2, "steps": 3, "eval_count": 2, "photographs": False,
              "image_size": SIZE, "log_every": 1, "device": str(device)}  # fmt: skip
    first = train(TrainConfig(**common, max_seconds=1e-3))
    assert not first["finished"] and first["step"] == 0 and Path(str(first["weights"])).is_file()
    result = train(TrainConfig(**common, resume=True, export=tmp_path / "assets" / "w.safetensors", commit="abc"))
    assert result["finished"] and result["step"] == 3
    with safe_open(tmp_path / "assets" / "w.safetensors", "pt") as file:
        record = file.metadata()
    assert record["model"] == "fastmetro-compact" and record["mesh"] == "anny-body" and record["commit"] == "abc"
    assert json.loads(record["config"])["batch_size"] == 2 and record["samples"] == "6"
    assert len(json.loads(record["commands"])) == 2  # the call that was stopped, and this one
    written = json.loads((tmp_path / "run" / "report.json").read_text())["report"]
    assert written["pa_mpjpe"] == result["report"]["pa_mpjpe"] > 0
    assert written["mean_mesh"]["pa_mpjpe"] > 0
    further = {**common, "output": tmp_path / "further", "steps": 1, "eval_count": 0, "seed": 1}
    result = train(TrainConfig(**further, initialise=tmp_path / "assets" / "w.safetensors"))
    with safe_open(Path(str(result["weights"])), "pt") as file:  # weights carry what made the ones they started from
        record = file.metadata()
    assert record["samples"] == "8" and len(json.loads(record["commands"])) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_training_on_captured_images_is_training_on_images(tmp_path):
    """The losses of the first steps agree, so no batch is overwritten before it is used."""
    logs = []
    for capture in (False, True):
        output = tmp_path / str(capture)
        common = {"batch_size": 4, "steps": 6, "eval_count": 0, "photographs": False, "image_size": 64, "log_every": 1}
        train(TrainConfig(output=output, precision="fp32", capture_images=capture, learning_rate=1e-5, **common))
        logs.append([float(row.split(",")[6]) for row in (output / "log.csv").read_text().splitlines()[1:]])
    assert logs[0] == pytest.approx(logs[1], rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_any_gpu_trains_from_graphs(tmp_path):
    """A graph is captured on a stream of the current device: on another one it would stay empty."""
    logs = []
    for device in ("cuda:0", "cuda:1"):
        output = tmp_path / device
        train(
            TrainConfig(
                output=output, device=device, batch_size=4, steps=6, eval_count=0, photographs=False, image_size=64,
                log_every=1, precision="fp32", capture_images=True, capture_step=True, learning_rate=1e-5,
            )
        )  # fmt: skip
        logs.append([float(row.split(",")[6]) for row in (output / "log.csv").read_text().splitlines()[1:]])
    assert logs[0] == pytest.approx(logs[1], rel=0.02) and len(set(logs[1])) == 6
