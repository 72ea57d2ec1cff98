"""`fastmetro train`, from the command line to weights that `fastmetro predict` takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmetro.cli import main
from fastmetro.inference.predictor import Predictor
from fastmetro.models.checkpoints import read_state_dict, weights_record

SMALL = ["--batch-size", "2", "--image-size", "32", "--no-photographs", "--eval-count", "0", "--device", "cpu"]


def test_train_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "--output", run, "--steps", "1", "--loss.vertices", "2.0", *SMALL]) == 0
    assert "finished at step 1" in capsys.readouterr().out
    weights = tmp_path / "run" / "weights.safetensors"
    result = Predictor(weights, device="cpu")(np.zeros((50, 40, 3), np.uint8))
    assert result.vertices.shape == (13348, 3) and np.isfinite(result.vertices).all()
    assert main(["train", "--output", run, "--steps", "1", *SMALL]) == 1
    assert "would be overwritten" in capsys.readouterr().err


def test_a_checkpoint_stands_for_the_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the trained weights, too, which are not what is exported."""
    run = tmp_path / "run"
    assert main(["train", "--output", str(run), "--steps", "3", "--learning-rate", "1e-2", *SMALL]) == 0
    checkpoint, weights = run / "checkpoint.pt", run / "weights.safetensors"
    kept = torch.load(checkpoint, weights_only=True)
    assert any(not torch.equal(kept["model"][name], value) for name, value in kept["average"].items())
    image = np.full((50, 40, 3), 90, np.uint8)
    first, second = (Predictor(path, device="cpu")(image).vertices for path in (checkpoint, weights))
    np.testing.assert_array_equal(first, second)
    further = []
    for start in (checkpoint, weights):
        output = tmp_path / start.name
        options = ["--output", str(output), "--steps", "1", "--seed", "1", "--initialise", str(start), *SMALL]
        assert main(["train", *options]) == 0
        record = weights_record(str(output / "weights.safetensors"))
        assert record["samples"] == "8" and len(json.loads(record["commands"])) == 2
        further.append(read_state_dict(output / "weights.safetensors"))
    assert all(torch.equal(further[0][name], value) for name, value in further[1].items())
    monkeypatch.setattr("fastmetro.models.checkpoints.MAX_BYTES", 1000)
    assert weights_record(checkpoint) == {}  # too large to be read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "fastmetro-xl"], "model name must be one of 'fastmetro-s'"),
        (["--mesh", "anny-hand"], "mesh must be anny-body to train on synthetic images alone, got 'anny-hand'"),
        (["--capture-images"], "capture_images needs a CUDA device, got cpu: give --no-capture-images"),
        (["--learning-rate", "0"], "learning_rate must be positive"),
        (["--initialise", "absent.safetensors"], "no checkpoint at absent.safetensors"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["train", "--output", str(tmp_path / "run"), *SMALL, *options])
    except SystemExit as stop:  # what the parser itself refuses
        status = stop.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
