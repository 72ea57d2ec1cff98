import csv
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from fastmetro.data.labels import MeshLabels
from fastmetro.training.config import TrainConfig
from fastmetro.training.export import export_weights
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import learning_rate_factor, make_optimizer
from fastmetro.training.sources import Batch, SyntheticBatches
from fastmetro.training.state import ExponentialAverage
from fastmetro.training.trainer import Trainer, TrainingDiverged

VERTICES = 6
MESH = SimpleNamespace(
    name="tiny",
    levels=(SimpleNamespace(kept=np.arange(VERTICES)), SimpleNamespace(kept=np.array([0, 3]))),
    joint_regressor=sp.csr_matrix(np.eye(2, VERTICES, dtype=np.float32)),
)


class TinyNetwork(nn.Module):
    """Has what matters to the loop: a batch norm, dropout, a token embedding."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 4 * 4, 3 * VERTICES + 3)
        self.tokens = nn.Embedding(1, 3)
        self.dropout = nn.Dropout(0.1)

    def forward(self, images):
        out = self.head(self.dropout(self.norm(images).flatten(1))).float()
        vertices = out[:, 3:].view(-1, VERTICES, 3) + self.tokens.weight
        return {
            "pred_cam": out[:, :3],
            "pred_3d_joints": vertices[:, :2],
            "pred_3d_vertices_fine": vertices,
            "pred_3d_vertices_coarse": vertices[:, [0, 3]],
        }


def source(indices):
    """Images that tell their labels exactly."""
    images = torch.stack([((indices * (7 + c)) % 11).float() / 11 for c in range(3)], dim=1)
    images = images[:, :, None, None].expand(-1, 3, 4, 4).contiguous()
    vertices = images[:, :, 0, :1].transpose(1, 2).expand(-1, VERTICES, 3).contiguous()
    there = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    joints = vertices[:, :2]
    image_points = torch.cat([joints[..., :2], torch.ones_like(joints[..., :1])], dim=-1)
    camera = torch.tensor([1.0, 0.0, 0.0], device=indices.device).expand(len(indices), 3)
    return images, MeshLabels(vertices, joints, image_points, camera, there, there, there)


def trainer(tmp_path, device="cpu", **options):
    settings = {"output": tmp_path, "batch_size": 8, "steps": 30, "log_every": 5, "save_every": 10, "precision": "fp32",
                "learning_rate": 1e-2, **options}  # fmt: skip
    torch.manual_seed(0)
    model = TinyNetwork().to(device)
    config = TrainConfig(**settings)
    objective = Objective(MeshRecoveryLoss(MESH)).to(device)
    return Trainer(config, model, objective, batches(source, config, device))


def batches(make, config, device="cpu"):
    """A source of the trainer from a function of indices."""
    indices = SyntheticBatches(None, config.batch_size, torch.device(device), overfit=config.overfit).indices
    return lambda step: Batch(*make(indices(step)))


def rows(tmp_path):
    with (tmp_path / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_loss_falls_and_is_logged(tmp_path, device):
    assert trainer(tmp_path, device, steps=120, log_every=20, save_every=60).run()
    log = rows(tmp_path)
    assert [int(row["step"]) for row in log] == list(range(20, 121, 20))
    assert float(log[-1]["loss"]) < 0.4 * float(log[0]["loss"])
    assert float(log[-1]["learning_rate"]) < float(log[0]["learning_rate"])
    assert int(log[-1]["samples"]) == 960 and float(log[-1]["images_per_second"]) > 0


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts")
    first._out_of_time = lambda: first.state.step >= 13
    assert not first.run()
    second = trainer(tmp_path / "parts", resume=True)
    assert second.state.step == 13
    assert second.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(whole.state.average.model.state_dict()[name], second.state.average.model.state_dict()[name])
    assert [int(row["step"]) for row in rows(tmp_path / "parts")] == [5, 10, 13, 15, 20, 25, 30]


def test_rows_made_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    run = trainer(tmp_path)
    run.run()
    saved = torch.load(run.checkpoint, weights_only=True)
    saved["step"] = 12
    torch.save(saved, run.checkpoint)
    trainer(tmp_path, resume=True)
    assert [int(row["step"]) for row in rows(tmp_path)] == [5, 10]


def test_points_made_after_the_checkpoint_are_hidden_on_resume(tmp_path: Path) -> None:
    """TensorBoard shows those of the steps that the run still has made, the checkpoint's own among them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    def steps() -> list[int]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [event.step for event in events.Scalars("training/loss")]

    run = trainer(tmp_path, tensorboard=True)
    run.run()
    assert steps() == [5, 10, 15, 20, 25, 30]
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1"))  # files are read by name, whose times may be equal
    saved = torch.load(run.checkpoint, weights_only=True)
    saved["step"] = 10
    torch.save(saved, run.checkpoint)
    again = trainer(tmp_path, tensorboard=True, log_every=10, resume=True)
    assert again.board is not None
    again.board.close()
    assert steps() == [5, 10]
    trainer(tmp_path, tensorboard=True, log_every=10, resume=True).run()
    assert steps() == [5, 10, 20, 30]


def test_a_resumed_run_keeps_its_loss_scale(tmp_path: Path) -> None:
    """Overflows have made it smaller, and steps since then count towards its growth."""
    settings: dict[str, Any] = {"precision": "fp16", "steps": 6, "log_every": 1}
    whole, first = (trainer(tmp_path / name, **settings) for name in ("whole", "parts"))
    for run in (whole, first):
        run.step.scaler.load_state_dict(run.step.scaler.state_dict() | {"scale": 2.0**40})
    assert whole.run()
    first._out_of_time = lambda: first.state.step >= 3
    assert not first.run()
    before = first.step.scaler.state_dict()
    assert before["scale"] < 2.0**40
    second = trainer(tmp_path / "parts", resume=True, **settings)
    assert second.step.scaler.state_dict() == before
    assert second.run() and second.step.scaler.state_dict() == whole.step.scaler.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_other_settings_are_refused_on_resume(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(ValueError, match=r"other settings.*batch_size: checkpoint 8, now 4"):
        trainer(tmp_path, resume=True, batch_size=4)
    trainer(tmp_path, resume=True, max_seconds=5.0)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer(tmp_path / "elsewhere", resume=True)


def test_a_checkpoint_is_never_overwritten_by_another_run(tmp_path):
    run = trainer(tmp_path)
    run.run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt would be overwritten: resume it"):
        trainer(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    def breaking(indices):
        images, labels = source(indices)
        return (images * float("nan") if int(indices[0]) >= 8 * 22 else images), labels

    run = trainer(tmp_path)
    run.source = batches(breaking, run.config)
    with pytest.raises(TrainingDiverged, match=r"between steps 20 and 25: .*loss.*last good state is in .*checkpoint"):
        run.run()
    content = torch.load(run.checkpoint, weights_only=True)
    assert content["step"] == 20
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    assert rows(tmp_path)[-1]["step"] == "20"


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.run()
    before = run.checkpoint.read_bytes()

    def broken_save(content, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(OSError, match="no space"):
        run.state.save(run.checkpoint, run.settings)
    assert run.checkpoint.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "log.csv"}


def test_time_budget_and_time_based_schedule(tmp_path):
    run = trainer(tmp_path, steps=10**6, max_seconds=0.5, total_seconds=1000.0)
    assert not run.run() and run.state.step > 0 and 0 < run.progress < 0.01
    run = trainer(tmp_path / "b", steps=10**6, total_seconds=0.3)
    assert run.run() and run.state.seconds >= 0.3


def test_what_the_first_step_of_a_call_waits_for_is_no_time_of_stepping(tmp_path):
    """Else compiling would take the warm-up of the rate, and more, of a run whose length is given in seconds."""
    slow = iter([0.4])

    def delayed(indices):
        time.sleep(next(slow, 0.0))
        return source(indices)

    run = trainer(tmp_path, steps=3, total_seconds=0.4, log_every=1)
    run.source = batches(delayed, run.config)
    assert run.run() and run.state.step == 3 and 0 < run.state.seconds < 0.4
    assert [bool(row["images_per_second"]) for row in rows(tmp_path)] == [False, True, True]


def test_a_signal_stops_after_the_step_with_everything_saved(tmp_path):
    import os
    import signal

    def interrupting(indices):
        if int(indices[0]) == 8 * 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return source(indices)

    run = trainer(tmp_path)
    run.source = batches(interrupting, run.config)
    assert not run.run()
    assert torch.load(run.checkpoint, weights_only=True)["step"] == 8
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_overfit_repeats_its_first_images():
    source = SyntheticBatches(None, 8, torch.device("cpu"), overfit=3)
    assert source.indices(0).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert source.indices(1).tolist() == [2, 0, 1, 2, 0, 1, 2, 0]


def test_bf16_steps_train(tmp_path, device):
    assert trainer(tmp_path, device, precision="bf16", steps=30, log_every=10).run()
    log = rows(tmp_path)
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


def test_evaluations_are_logged(tmp_path):
    run = trainer(tmp_path, eval_every=10, eval_count=4)
    seen = []

    def evaluate(model):
        seen.append(model)
        assert not model.training
        return {"mpjpe": 1.0, "pa_mpjpe": 2.0, "mpvpe": 3.0}

    run.evaluate = evaluate
    run.run()
    assert len(seen) == 3 and all(model is run.state.average.model for model in seen)
    assert [row["pa_mpjpe"] for row in rows(tmp_path) if row["mpjpe"]] == ["2.0"] * 3


def test_the_best_weights_are_kept(tmp_path):
    """Those of the smallest PA-MPJPE, also over a resumption; an error that is NaN is never the best."""
    errors = iter([float("nan"), 5.0, 7.0, 6.0, 4.0, 9.0])
    kept = []

    def evaluated(steps, **options):
        run = trainer(tmp_path, eval_every=10, steps=60, **options)
        run.evaluate = lambda model: {"mpjpe": 1.0, "pa_mpjpe": next(errors), "mpvpe": 1.0}
        run.export = lambda run, path, row: kept.append((run.state.step, path.name, row["pa_mpjpe"]))
        run._out_of_time = lambda: run.state.step >= steps
        run.run()
        return run

    evaluated(30)
    assert evaluated(60, resume=True).state.best == 4.0
    assert kept == [(20, "best.safetensors", 5.0), (50, "best.safetensors", 4.0)]


def test_the_average_follows_weights_and_statistics():
    model = TinyNetwork()
    average = ExponentialAverage(model, decay=0.9)
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    average.update(model, step=100)
    for name, value in average.model.state_dict().items():
        expected = before[name] + (0.1 if value.is_floating_point() else 1)
        torch.testing.assert_close(value, expected, msg=name)
    average.update(model, step=0)  # early on, the average forgets quickly: decay 0.1
    torch.testing.assert_close(average.model.head.weight, before["head.weight"] + 0.1 + 0.9 * 0.9)


def test_schedule_and_parameter_groups():
    assert learning_rate_factor(0.0, 0.1) == pytest.approx(1e-3)
    assert learning_rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1) == pytest.approx(1.0)
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0.0)
    assert learning_rate_factor(0.0, 0.0) == pytest.approx(1.0)
    model = TinyNetwork()
    decayed, plain = make_optimizer(model, 1e-3, 0.1).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.head.weight)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0.0


def test_bad_settings_are_named():
    for name, value in (
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("max_seconds", -1.0),
        ("warmup", 1.0),
        ("dropout", 1.0),
        ("learning_rate", float("inf")),
        ("weight_decay", float("nan")),
        ("seed", -1),
        ("seed", 2**70),
        ("betas", (2.0, 0.9)),
    ):
        with pytest.raises(ValueError, match=name):
            TrainConfig(**{name: value})
    with pytest.raises(ValueError, match="precision"):
        TrainConfig(precision="fp8")
    assert TrainConfig(resume=True, initialise="absent.safetensors").resume  # a checkpoint brings its own weights
    assert "output" not in TrainConfig().settings() and "seed" in TrainConfig().settings()
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {name.partition(".")[0] for name in TrainConfig().settings()} <= names


def test_export_rounds_matrices_only_and_records_its_making(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    model = TinyNetwork()
    path = tmp_path / "w.safetensors"
    size = export_weights(model, path, {"command": "x", "config": {"a": 1}})
    assert size == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "command": "x", "config": '{"a": 1}'}
    loaded = load_file(path)
    assert set(loaded) == set(model.state_dict())
    assert loaded["head.weight"].dtype == torch.bfloat16 and loaded["norm.running_var"].dtype == torch.float32
    torch.testing.assert_close(loaded["head.weight"].float(), model.head.weight.detach(), rtol=2**-8, atol=0)
    with pytest.raises(ValueError, match="more than 100"):
        export_weights(model, tmp_path / "small.safetensors", {}, max_bytes=100)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.bias"):
        export_weights(model, tmp_path / "nan.safetensors", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_export_in_float32_loses_nothing(tmp_path):
    from safetensors.torch import load_file

    model = TinyNetwork()
    export_weights(model, tmp_path / "w.safetensors", {}, dtype="float32")
    loaded = load_file(tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype, name
    with pytest.raises(ValueError, match="dtype must be one of 'bfloat16', 'float32', got 'float16'"):
        export_weights(model, tmp_path / "x.safetensors", {}, dtype="float16")
    assert TrainConfig().written_dtype == "float32"
    assert TrainConfig(export=tmp_path / "ship.safetensors").written_dtype == "bfloat16"
    assert TrainConfig(export_dtype="bfloat16").written_dtype == "bfloat16"


def test_a_captured_step_is_let_go_at_the_end(tmp_path):
    """NCCL waits for graphs with collectives in them before the process group may go."""
    config = TrainConfig(output=tmp_path, batch_size=4, steps=2, precision="fp32")
    indices = SyntheticBatches(None, 4, torch.device("cpu")).indices
    objective = Objective(MeshRecoveryLoss(MESH))
    trainer = Trainer(config, TinyNetwork(), objective, lambda step: Batch(*source(indices(step))))
    trainer._run_step = lambda images, labels: trainer.step(images, labels)
    assert trainer.run() and trainer._run_step is trainer.step
