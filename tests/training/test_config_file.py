"""Settings from YAML files: those of `configs/` as they are, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from fastmetro.cli import main
from fastmetro.training.config import TrainConfig
from fastmetro.training.config_file import file_arguments
from fastmetro.training.losses import LossWeights

CONFIGS = Path(__file__).parents[2] / "configs"


def parsed(path: Path, *options: str) -> TrainConfig:
    return tyro.cli(TrainConfig, args=[*file_arguments(path, TrainConfig), *options])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_accepted(path: Path) -> None:
    config = parsed(path)
    assert config != TrainConfig()
    assert config.mesh in ("smpl", "mano", "anny-body")


def test_losses_of_the_shipped_configurations_are_the_published_ones() -> None:
    assert parsed(CONFIGS / "body.yaml").loss == LossWeights.published_body()
    assert parsed(CONFIGS / "3dpw.yaml").loss == LossWeights.published_body()
    assert parsed(CONFIGS / "smpl.yaml").loss == LossWeights.published_body()
    assert parsed(CONFIGS / "hand.yaml").loss == LossWeights.published_hand()


def test_values_of_every_kind_and_overriding(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "steps: 7\nlearning_rate: 1.0e-5\ntensorboard: true\nphotographs: false\nexport: null\nbackbone: resnet50\n"
        "data:\n  files: [a.yaml, b c.yaml]\n  shares: [1, 2.5]\nloss:\n  centred: true\n"
    )
    config = parsed(path, "--steps", "9", "--data.files", "d.yaml", "e.yaml", "--no-tensorboard")
    assert config.steps == 9 and config.learning_rate == 1e-5 and config.backbone == "resnet50"
    assert not config.tensorboard and not config.photographs and config.export is None
    assert config.data.files == (Path("d.yaml"), Path("e.yaml")) and config.data.shares == (1.0, 2.5)
    assert config.loss.centred
    assert parsed(path).data.files == (Path("a.yaml"), Path("b c.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 7", r"there is no setting 'step'; did you mean 'steps'\?"),
        ("data: {file: [a]}", r"there is no setting 'data\.file'; did you mean 'files'"),
        ("data: 3", "data must be a section of settings, got 3"),
        ("steps: {a: 1}", "steps must be a text, a number, true or false, or a list"),
        ("output: null", "output must have a value, got null; leave it out for the default"),
        ("data: {workers: null}", r"data\.workers must have a value, got null"),
        ("fused: 'yes please'", 'fused must be true or false, got "yes please"'),
        ("fused: 3", "fused must be true or false, got 3"),
        ("fused: null", "fused must be true or false, got null"),
        ("loss: {centred: 1}", r"loss\.centred must be true or false, got 1"),
        ("steps: true", "steps must have a value other than true or false, got true"),
        ("steps: [1, 2]", r"steps must be one value, got the list \[1, 2\]"),
        ("data: {files: [null]}", r"data\.files must be a list of texts or numbers, got \[null\]"),
        ("[1, 2]", "must hold names and values, got list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        file_arguments(path, TrainConfig)
    assert str(path) in str(caught.value)


def test_the_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("batch_size: 2\nimage_size: 32\nphotographs: false\neval_count: 0\ndevice: cpu\nsteps: 5\n")
    assert main(["train", str(path), "--steps", "1", "--output", str(tmp_path / "run")]) == 0
    assert "finished at step 1" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml' does not exist" in capsys.readouterr().err
