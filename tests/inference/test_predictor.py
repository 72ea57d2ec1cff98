"""From image files to result files, with random weights: what is written, what is refused, what goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmetro
from fastmetro.cli import main
from fastmetro.inference.batch import collect_images, result_names
from fastmetro.inference.images import crop_window, cut_crop, to_input
from fastmetro.inference.predictor import Predictor
from fastmetro.inference.pretrained import load_pretrained, weights_record
from fastmetro.models.checkpoints import CheckpointMismatch
from fastmetro.training.export import export_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact network with random weights, saved as training saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    export_weights(
        fastmetro.create_model("fastmetro-compact"), path, {"model": "fastmetro-compact", "mesh": "anny-body"}
    )
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small noise picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def test_prediction_is_the_network_on_the_crop(checkpoint: Path, image: Path) -> None:
    predictor = Predictor(checkpoint, device="cpu")
    result = predictor(image, (10, 10, 60, 100))
    again = predictor(np.asarray(Image.open(image)), (10, 10, 60, 100))
    assert result.vertices.shape == (13348, 3) and result.joints.shape == (14, 3) and result.camera.shape == (3,)
    assert np.isfinite(result.vertices).all()
    np.testing.assert_array_equal(result.vertices, again.vertices)
    assert not np.array_equal(result.vertices, predictor(image).vertices)  # another crop, another mesh
    assert result.image_size == (120, 90) and result.joint_names[0] == "R_Ankle"


def test_crops_have_the_size_of_the_training(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    weights = tmp_path / "small.safetensors"
    record = {"model": "fastmetro-compact", "mesh": "anny-body", "config": {"image_size": 96}}
    model = load_pretrained(checkpoint)
    export_weights(model, weights, record)
    pixels = np.asarray(Image.open(image))
    crop = cut_crop(pixels, crop_window(120, 90, None), 96)
    with torch.inference_mode():
        expected = model(to_input(crop)[None])["pred_3d_vertices_fine"][0]
    predictor = Predictor(weights, device="cpu")
    np.testing.assert_allclose(predictor(pixels).vertices, expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"a crop must be \[96, 96, 3\], got \[224, 224, 3\]"):
        predictor.forward([np.zeros((224, 224, 3), np.uint8)])


def test_plain_and_fused_paths_agree(checkpoint: Path, image: Path) -> None:
    plain, fused = (Predictor(checkpoint, attention=a, device="cpu")(image) for a in ("dense", "auto"))
    np.testing.assert_allclose(plain.vertices, fused.vertices, atol=1e-5)


def test_predict_writes_four_files_per_image_and_survives_a_bad_one(
    checkpoint: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(image.read_bytes())
    (folder / "broken.jpg").write_text("no image")
    inputs = [str(folder), str(tmp_path / "absent.png")]
    status = main(["predict", *inputs, "--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"])
    printed = capsys.readouterr()
    assert status == 1
    assert "broken.jpg" in printed.err and "absent.png" in printed.err and "2 of 4 images done" in printed.out
    assert "4/4" in printed.err  # the progress bar
    expected = {f"{stem}{end}" for stem in ("a", "b") for end in ("_overlay.png", "_side.png", ".glb", ".npz")}
    assert {path.name for path in out.iterdir()} == expected
    assert Image.open(out / "a_overlay.png").size == (90, 120)


def test_cli_errors_are_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path / "none.png"), "--out", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["predict", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "fastmetro: error: no image was given\n"
    assert main(["predict", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "holds no image" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["predict"])
    assert stop.value.code == 2


def test_box_goes_with_one_image(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", str(image), str(image), "--out", "x", "--box", "0", "0", "5", "5"]
    assert main(arguments) == 1
    assert "--box goes with one image, got 2" in capsys.readouterr().err


def test_names_stay_distinct() -> None:
    assert result_names([Path("x/a.png"), Path("y/a.jpg"), Path("b.png")]) == ["a", "a-2", "b"]


def test_folders_are_sorted_images(image: Path) -> None:
    (image.parent / "notes.txt").write_text("")
    assert collect_images([image.parent]) == [image]


def test_unknown_and_unnamed_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the shipped names: 'fastmetro-compact'"):
        load_pretrained("fastmetro-huge")
    torch.save({"a": torch.zeros(1)}, tmp_path / "released.bin")
    with pytest.raises(ValueError, match="does not name its network"):
        load_pretrained(tmp_path / "released.bin")
    (tmp_path / "damaged.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pretrained(tmp_path / "damaged.safetensors")


def test_wrong_model_for_a_checkpoint_is_refused(checkpoint: Path) -> None:
    model = fastmetro.create_model("fastmetro-s", backbone="compact")
    with pytest.raises(CheckpointMismatch, match="of another shape"):
        load_pretrained(checkpoint, model=model)


def test_record_names_the_network(checkpoint: Path) -> None:
    assert weights_record(checkpoint)["model"] == "fastmetro-compact"
