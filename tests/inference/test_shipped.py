"""What a user gets without training: the weights in the package, the demo, and the numbers of `fastmetro eval`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmetro.cli import main
from fastmetro.evaluation import synthetic
from fastmetro.inference import demo
from fastmetro.inference.pretrained import SHIPPED, load_pretrained, trained_size, weights_record
from fastmetro.meshes.mesh import load_mesh
from fastmetro.training.export import SHIPPED_BYTES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def test_shipped_weights_fit_and_say_how_they_were_made() -> None:
    path = SHIPPED["fastmetro-compact"]
    assert path.stat().st_size <= SHIPPED_BYTES
    record = weights_record(path)
    assert record["model"] == "fastmetro-compact" and record["mesh"] == "anny-body"
    commands = json.loads(record["commands"])
    assert commands and all("fastmetro train" in command for command in commands)
    assert int(record["samples"]) > 10**6 and record["commit"]
    config = json.loads(record["config"])
    assert config["seed"] != synthetic.HELD_OUT_SEED and config["image_size"] == 224


def test_checkpoints_say_which_images_they_were_trained_on(tmp_path: Path) -> None:
    assert trained_size("fastmetro-compact") == trained_size(tmp_path / "released.bin") == 224
    from safetensors.numpy import save_file

    for config, size in (('{"image_size": 64}', 64), ('{"image_size": "64"}', None), ('{"image_size": 9999}', None)):
        save_file({"x": np.zeros(1)}, tmp_path / "w.safetensors", {"config": config})
        if size is not None:
            assert trained_size(tmp_path / "w.safetensors") == size
        else:
            with pytest.raises(ValueError, match="must have an image_size of 16 to 4096, got"):
                trained_size(tmp_path / "w.safetensors")


def test_published_report_is_of_the_shipped_weights() -> None:
    """The numbers of the README were measured on these weights, and the log is that of the runs that made them."""
    record = weights_record(SHIPPED["fastmetro-compact"])
    report = json.loads((RESULTS / "compact_training.json").read_text())
    assert report["commands"] == json.loads(record["commands"]) and report["config"] == json.loads(record["config"])
    assert str(report["samples"]) == record["samples"] and report["commit"] == record["commit"]
    with (RESULTS / "compact_training.csv").open() as file:
        images = {row["run"]: int(row["samples"]) for row in csv.DictReader(file)}  # the last row of each run
    assert len(images) == len(report["commands"]) and sum(images.values()) == report["samples"]
    errors = report["report"]
    assert errors["pa_mpjpe"] <= 0.5 * errors["mean_mesh"]["pa_mpjpe"]
    readme = (ROOT / "README.md").read_text()
    for measured in (errors, errors["mean_mesh"], errors["mean_mesh_facing"]):
        assert " | ".join(f"{measured[name]:.1f}" for name in ("mpjpe", "pa_mpjpe", "mpvpe")) in readme


def test_shipped_weights_beat_the_mean_mesh_on_held_out_images(device: torch.device) -> None:
    """A few images, with room for rounding: `fastmetro eval` measures a thousand."""
    model = load_pretrained("fastmetro-compact").to(device)
    report = synthetic.evaluate_synthetic(model, 16, baselines=False, batch_size=8)
    people = synthetic.SyntheticPeople(model.mesh, synthetic.HELD_OUT_SEED, photographs=False)
    mean = synthetic.mean_meshes(synthetic.SyntheticPeople(model.mesh, 0, photographs=False), 64, 16)
    truth = people.labels(torch.arange(16)).vertices
    for constant, pa_limit in ((mean.camera, 0.42), (mean.facing, 0.49)):
        errors = synthetic.mesh_errors(constant.expand_as(truth), truth, people.joint_regressor, people.root_joints)
        for name, limit in (("mpjpe", 0.43), ("pa_mpjpe", pa_limit)):
            assert float(str(report[name])) < limit * float(errors[name].mean()), name


def test_eval_prints_network_and_mean_mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic.mean_meshes, "__defaults__", (8, 8))
    table = str(tmp_path / "eval.csv")
    options = ["--count", "2", "--batch-size", "2", "--device", "cpu", "--csv", table]
    assert main(["eval", "--data", "synthetic", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PA-MPJPE" in lines[0] and "mm" in lines[0]
    rows = {line[:22].strip(): [float(value) for value in line[22:].split()] for line in lines[1:4]}
    assert list(rows) == ["network", "mean mesh", "mean mesh, facing"]
    assert all(len(values) == 3 and min(values) > 1 for values in rows.values())
    assert lines[4] == f"2 synthetic images of seed {synthetic.HELD_OUT_SEED}; {synthetic.SYNTHETIC_PROTOCOL}"


def test_demo_shows_three_people_and_two_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.median_milliseconds, "__defaults__", (0.0,))
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 0
    names = ["astronaut", *(f"synthetic-{index}" for index in demo.HELD_OUT)]
    expected = {f"{name}{end}" for name in names for end in ("_overlay.png", "_side.png", ".glb", ".npz")}
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "demo.png"}
    people = synthetic.SyntheticPeople(load_mesh("anny-body"), synthetic.HELD_OUT_SEED)
    for name, pixels in demo.demo_images(people).items():  # the mesh is drawn over the picture, in most of its middle
        overlay = np.asarray(Image.open(tmp_path / f"{name}_overlay.png")).astype(int)
        assert overlay.shape == pixels.shape
        assert 0.03 < (np.abs(overlay - pixels).max(axis=2) > 8).mean() < 0.9
    printed = capsys.readouterr().out
    assert "trained on synthetic people only" in printed
    times = [line.split()[-2:] for line in printed.splitlines() if line.startswith("  ")]
    assert len(times) == 2 and all(float(value) > 0 and unit == "ms" for value, unit in times)
