"""Runs on SMPL's and MANO's meshes from TSV files to report, with model files made up here."""

from __future__ import annotations

import csv
import errno
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_published import fake_model
from tsv_cases import cell, jpeg, label, rows, write_set

from fastmetro.cli import main
from fastmetro.data.tsv.rows import encode_image
from fastmetro.distributed import World
from fastmetro.evaluation.command import load_network
from fastmetro.evaluation.settings import EvalSettings
from fastmetro.inference.pretrained import NetworkChoice
from fastmetro.models.checkpoints import read_state_dict, weights_record
from fastmetro.training.config import DataConfig, TrainConfig
from fastmetro.training.setup import Setup, in_steps
from fastmetro.training.trainer import METRICS

SMALL = ["--model", "fastmetro-compact", "--batch-size", "2", "--steps", "2", "--image-size", "32", "--device", "cpu",
         "--precision", "fp32", "--data.workers", "0", "--eval-count", "3", "--eval-every", "2",
         "--log-every", "1"]  # fmt: skip


@pytest.fixture
def published(shared: Path) -> str:
    folder = shared / "data" / "fastmetro"
    if not (folder / "mesh_downsampling.npz").is_file():
        pytest.skip(f"no published data in {folder}")
    return str(folder)


def data_set(folder: Path, kind: str, further: Sequence[tuple[str, bytes, str, str]] = ()) -> Path:
    joints, pose = (24, 72) if kind == "body" else (21, 48)
    folder.mkdir()
    points = {"3d_joints": (torch.randn(joints, 4, generator=torch.Generator().manual_seed(0)).abs()).tolist()}
    content = [
        (f"im{i}", encode_image(jpeg(40, 30, 9 * i)),
         cell(label(joints, pose, scale=0.15, has_smpl=1, pose=[0.01 * i] * pose, **points)), "40 30")
        for i in range(5)
    ]  # fmt: skip
    return write_set(folder, [*content, *further])


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def strict_json(path: Path) -> dict[str, Any]:
    """Python also writes and reads NaN, which JSON has not."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{path} holds {text}")

    return json.loads(path.read_text(), parse_constant=refuse)


def model_file(name: str, folder: Path) -> str:
    path = folder / f"{name}.pkl"
    path.write_bytes(pickle.dumps(fake_model(name), 2))
    return str(path)


@pytest.mark.parametrize(
    ("mesh", "protocol", "options"),
    [
        ("smpl", "3dpw", ["--upsampling", "released", "--compat", "published", "--loss.centred"]),
        ("smpl", "3dpw", ["--stage", "smpl", "--smpl-loss.mesh", "1e-8"]),
        ("mano", "freihand", ["--loss.edge-lengths", "1", "--loss.surface-level", "fine"]),
        ("mano", "hand", ["--compat", "published"]),
        ("mano", "hand", []),
    ],
    ids=["body", "parameters", "freihand", "published hand", "hand"],
)
def test_from_rows_to_a_report(mesh: str, protocol: str, options: list[str], published: str, tmp_path: Path) -> None:
    """The report has what `fastmetro eval` measures, on images of the training's size; weights tell their `compat`."""
    data = str(data_set(tmp_path / "data", "hand" if mesh == "mano" else "body"))
    model, run = model_file(mesh, tmp_path), tmp_path / "run"
    files = ["--data.mesh-data", published, "--data.body-model", model, "--mesh", mesh]
    freihand = protocol == "freihand"
    measured = ["--eval-count", "0"] if freihand else ["--data.eval-file", data, "--data.protocol", protocol]
    arguments = ["train", "--output", str(run), *SMALL, "--data.files", data, *files, *measured, *options]
    assert main(arguments) == 0
    log = table(run / "log.csv")
    assert float(log[0]["vertices_fine"]) > 0
    assert ("smpl_rotations" in log[0]) == ("smpl" in options)
    assert ("edge_lengths" in log[0]) == freihand == (not (run / "report.json").exists())
    if not freihand:
        best = float(weights_record(run / "best.safetensors")["pa_mpjpe"])
        assert best == pytest.approx(float(log[-1]["pa_mpjpe"])) and float(log[-1]["mpvpe"]) > 0
        report = strict_json(run / "report.json")["report"]
        assert report["protocol"] == protocol and report["mpjpe"] > 0 and report["count"] == 3
        assert ("smpl_parameters" in report) == ("smpl" in options)
    evaluated = ["eval", "--checkpoint", str(run / "weights.safetensors"), "--data", data, "--protocol", protocol]
    evaluated += ["--mesh-data", published, "--body-model", model, "--device", "cpu", "--csv", str(run / "eval.csv")]
    choice = NetworkChoice(mesh_data=Path(published), body_model=Path(model))
    network = load_network(EvalSettings(str(run / "weights.safetensors"), network=choice))
    assert network.config.smpl_compat == ("published" in options)
    evaluated += ["--predictions", str(run / "pred.zip")] if freihand else ["--count", "3"]
    evaluated += ["--compat", "published"] if "published" in options else []
    assert main(evaluated) == 0
    found = {row["protocol"]: row for row in table(run / "eval.csv")}
    assert list(found) == [protocol, *([f"{protocol}, SMPL parameters"] if "smpl" in options else [])]
    assert len({row["pa_mpvpe"] for row in found.values()}) == len(found)
    if not freihand:
        for row, reported in zip(found.values(), (report, report.get("smpl_parameters")), strict=False):
            for name in METRICS:
                assert float(row[name]) == pytest.approx(reported[name], rel=1e-4), (row["protocol"], name)
    assert (run / "pred.zip").is_file() == freihand
    (tmp_path / "photo.jpg").write_bytes(jpeg(60, 50))
    predicted = ["predict", str(tmp_path / "photo.jpg"), "--out", str(run / "out"), "--device", "cpu"]
    predicted += ["--checkpoint", str(run / "weights.safetensors"), "--mesh-data", published, "--body-model", model]
    assert main(predicted) == 0 and (run / "out" / "photo.glb").is_file()


def test_the_regressor_of_parameters_is_trained_on_top_of_a_body_network(published: str, tmp_path: Path) -> None:
    """The body's weights are taken over, and with a rate of next to nothing they stay."""
    data, model = str(data_set(tmp_path / "data", "body")), model_file("smpl", tmp_path)
    files = ["--data.files", data, "--data.mesh-data", published, "--data.body-model", model, "--mesh", "smpl"]
    body, stage = tmp_path / "body", tmp_path / "stage"
    common = [*SMALL[:-6], "--eval-count", "0", *files, "--ema-decay", "0", "--dropout", "0"]
    assert main(["train", "--output", str(body), *common]) == 0
    weights = str(body / "weights.safetensors")
    more = ["--stage", "smpl", "--learning-rate", "1e-9", "--initialise", weights]
    assert main(["train", "--output", str(stage), *common, *more]) == 0
    before, after = read_state_dict(weights), read_state_dict(stage / "weights.safetensors")
    new = {name for name in after if name.startswith("smpl_parameter_regressor.")}
    assert new and set(after) - new == set(before)
    tokens = "vertex_token_embed.weight"  # two steps may change what is near 0
    torch.testing.assert_close(after[tokens], before[tokens], rtol=0, atol=1e-8)
    other = [*common[:-4], "--model", "fastmetro-s", "--stage", "smpl", "--initialise", weights]
    assert main(["train", "--output", str(tmp_path / "other"), *other]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "smpl"], "needs data=, the folder of data files"),
        (["--stage", "smpl"], "stage 'smpl' needs mesh 'smpl' and data.body_model"),
        (["--epochs", "3"], "epochs are passes over data.files"),
        (["--data.synthetic-share", "0.5"], "mixes synthetic images into data.files"),
        (["--schedule", "step"], "drop_at must be shares between 0 and 1"),
        (["--batch-size", "3", "--accumulate", "2"], "batch_size must be a multiple of accumulate, got 3 and 2"),
        (["--capture-step"], "capture_step needs a CUDA device"),
        (["--data.files", "absent.yaml", "--capture-images"], "capture_images is of synthetic images alone"),
        (["--data.files", "x.yaml", "--compile-images"], "data.files: give --no-compile-images"),
        (["--data.files", "x.yaml", "--epochs", "inf"], "epochs must be finite, got inf"),
        (["--image-size", "8"], "image_size must lie between 16 and 4096 pixels, got 8"),
        (["--data.files", "x.yaml", "--data.shares", "inf"], "data.shares must be positive and finite, got (inf,)"),
        (["--export", "x.safetensors", "--export-dtype", "float32"], "export is for weights of up to 16777216 bytes"),
        (["--data.files", "absent.yaml"], "data set 'absent.yaml' does not exist"),
        (["--data.eval-file", "absent.yaml", "--data.protocol", "x"], "protocol must be one of 'h36m-p2'"),
        (
            ["--data.eval-file", "absent.yaml", "--data.protocol", "freihand"],
            "evaluation set are dummies; give eval_count",
        ),
        (["--eval-every", "0", "--eval-every-epochs", "1"], "eval_every_epochs counts passes over data.files"),
        (["--data.files", "x.yaml", "--eval-every-epochs", "1"], "one must be 0, got 2 and 1"),
        (["--eval-every-epochs", "-1"], "eval_every_epochs must not be negative, got -1"),
        (["--backbone-weights", "absent.pth"], "no checkpoint at absent.pth"),
        (["--data.body-model", "x.pkl"], "data.body_model goes with mesh 'smpl' or 'mano', got mesh 'anny-body'"),
        (["--seed", "1", "configs/body.yaml"], "must stand right behind `train`, got configs/body.yaml behind --seed"),
        (["--data.files", "a.yaml", "b.yaml"], "data set 'a.yaml' does not exist"),
        (["--output", "/proc/no/such"], "output /proc/no/such/checkpoint.pt cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["train", "--output", str(tmp_path / "run"), *SMALL, *options])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2) and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["data.files", "data.eval_file"])
def test_hands_are_no_labels_of_a_body(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body, hand = (str(data_set(tmp_path / kind, kind)) for kind in ("body", "hand"))
    files = [body, hand] if name == "data.files" else [body]
    options = ["--data.files", *files, *(["--data.eval-file", hand] if name == "data.eval_file" else [])]
    assert main(["train", "--output", str(tmp_path / "run"), *SMALL, *options]) == 1
    assert f"{name} must be of a body, got {hand}, whose labels are of a hand" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(data_set(tmp_path / "data", "body"))
    options = ["--data.files", data, "--data.eval-file", data, "--eval-count", "0"]
    assert main(["train", "--output", str(tmp_path / "run"), *SMALL, *options]) == 0
    said = capsys.readouterr().err
    assert "eval_count is 0: nothing is measured, and data.eval_file and eval_every without effect" in said
    assert "mesh 'anny-body' has no parameters of SMPL or MANO: of rows of data.files only joints count" in said


def test_rows_that_could_not_be_measured_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_set(tmp_path / "data", "body", [("bad", encode_image(jpeg()), cell(label(scale=0)), "40 30")])
    files = ["--data.files", str(data), "--data.eval-file", str(data), "--data.protocol", "h36m-p2"]
    options = [*SMALL, *files, "--eval-every", "0", "--eval-count", "None"]
    with pytest.warns(RuntimeWarning, match="empty box"):
        assert main(["train", "--output", str(tmp_path / "run"), *options]) == 0
    assert "; 5 rows, 1 could not be used" in capsys.readouterr().out


def test_what_cannot_be_written_in_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--output", str(tmp_path / "run"), *SMALL]

    def full(*arguments: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "weights.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr("fastmetro.training.loop.export_weights", full)
        assert main([*run, "--eval-every", "0"]) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and "the last good state is in" in said and "resuming it writes the rest" in said

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Setup, "report", interrupted)
        assert main([*run, "--eval-every", "0", "--resume"]) == 130
    said = capsys.readouterr().err
    assert "not measured; the last good state is in" in said and "fastmetro: interrupted" in said
    assert not (tmp_path / "run" / "report.json").exists()
    assert main([*run, "--eval-every", "0", "--resume"]) == 0 and (tmp_path / "run" / "report.json").is_file()


@pytest.mark.parametrize(
    ("further", "shown"),
    [
        (("--eval-every", "5", "--save-every", "2"), [5]),
        (("--eval-every", "0", "--save-every", "2"), [2, 4]),
        (("--eval-every", "5", "--eval-count", "0", "--save-every", "2"), [2, 4]),
    ],
)
def test_epochs_become_steps_and_pictures_are_kept(tmp_path: Path, further: tuple[str, ...], shown: list[int]) -> None:
    """Five rows in batches of two, two epochs: five steps. Without an evaluation each saved state has a picture."""
    data = str(data_set(tmp_path / "data", "body"))
    run = tmp_path / "run"
    options = [*SMALL, "--data.files", data, "--epochs", "2", "--tensorboard", *further]
    assert main(["train", "--output", str(run), *options, "--data.synthetic-share", "0", "--no-photographs"]) == 0
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Images("meshes")] == shown


@pytest.mark.parametrize(
    ("compat", "count", "batch_size", "epochs", "steps", "every"),
    [
        (None, 312_188, 64, 60, 292_677, 4877),
        ("published", 312_188, 64, 60, 292_620, 4877),
        ("published", 130_240, 64, 200, 407_000, 2035),
        ("published", 5, 2, 3, 6, 2),
        (None, 5, 2, 3, 8, 2),
        (None, 5, 8, 2, 2, 1),
    ],
)
def test_an_epoch_has_whole_steps_as_published(
    compat: Any, count: int, batch_size: int, epochs: int, steps: int, every: int
) -> None:
    """The released code makes (rows // images) * epochs steps and evaluates after each rows // images."""
    config = TrainConfig(
        compat=compat, batch_size=batch_size, epochs=epochs, eval_every_epochs=1, data=DataConfig((Path("x.yaml"),))
    )
    found = in_steps(config, count)
    assert (found.steps, found.eval_every) == (steps, every)
    if compat == "published":
        assert (steps, every) == (count // batch_size * epochs, count // batch_size)
        with pytest.raises(ValueError, match=rf"batch_size must be .*, got {batch_size} for {batch_size - 1} rows"):
            in_steps(config, batch_size - 1)


@pytest.mark.parametrize("compat", [None, "published"])
def test_each_epoch_is_measured_on_all_rows(compat: str | None, tmp_path: Path) -> None:
    """Rows without vertices, as Human3.6M's."""
    data, run = str(data_set(tmp_path / "data", "body")), tmp_path / "run"
    files = ["--data.files", data, "--data.eval-file", data, "--data.protocol", "h36m-p2"]
    every = ["--epochs", "2", "--eval-every", "0", "--eval-every-epochs", "1", "--eval-count", "None"]
    published = [] if compat is None else ["--compat", compat]
    assert main(["train", "--output", str(run), *SMALL, *files, *every, *published]) == 0
    measured = [row for row in table(run / "log.csv") if row["pa_mpjpe"]]
    assert [row["step"] for row in measured] == ["2", "4"]
    report = strict_json(run / "report.json")["report"]
    assert report["count"] == 5 and report["skipped"] == {}
    assert report["mpvpe"] == (None if compat is None else 0.0)  # the released code prints 0.00
    assert measured[0]["mpvpe"] == ("" if compat is None else "0.0")
    weights = read_state_dict(run / "weights.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    if compat == "published":  # the last epoch ends with the run: the same weights, before they were written
        assert float(measured[-1]["pa_mpjpe"]) == pytest.approx(report["pa_mpjpe"], abs=6e-4)


@pytest.mark.parametrize("compat", [None, "published"])
def test_labels_are_those_of_the_setting(compat: Any, tmp_path: Path) -> None:
    """In these rows every other joint has confidence, and one of the hips has none: see `GroundTruth`."""
    data = DataConfig((write_set(tmp_path, rows()),), workers=0)
    config = TrainConfig(batch_size=2, image_size=32, compat=compat, eval_count=0, device="cpu", data=data)
    confidence = Setup(config, World(), torch.device("cpu")).source(0).labels.joints_3d[..., 3]
    expected = [0.0] * 14 if compat is None else [joint % 2 for joint in (*range(13), 18)]
    assert set(confidence.unique().tolist()) == set(expected) and confidence.sum() == 2 * sum(expected)
