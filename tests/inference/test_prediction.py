"""The prediction's camera and files: a .glb that stands upright, whole files, clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from fastmetro.inference.images import CropWindow
from fastmetro.inference.prediction import Prediction


@pytest.fixture
def prediction() -> Prediction:
    """A tall box that stands in front of the camera: y down, so its head has negative y."""
    box = trimesh.creation.box(extents=(0.5, 1.8, 0.3))
    return Prediction(
        vertices=(box.vertices + np.array([0.0, -0.9, 0.0])).astype(np.float32),
        joints=np.array([[0, -1.8, 0], [0, 0, 0]], np.float32),
        camera=np.array([0.8, 0.1, 0.9], np.float32),
        window=CropWindow(100, 50, 400),
        image_size=(600, 800),
        faces=np.asarray(box.faces),
        joint_names=("Head", "Foot"),
    )


def test_projection_goes_through_the_crop_to_the_image(prediction: Prediction) -> None:
    pixel = prediction.project(np.array([[0.0, 0.0, 5.0]]))[0]
    crop = 0.8 * np.array([0.1, 0.9])
    np.testing.assert_allclose(pixel, (crop + 1) / 2 * 400 + [100, 50], rtol=1e-6)


def test_image_camera_agrees_with_the_projection(prediction: Prediction) -> None:
    scale, dx, dy = prediction.image_camera()
    np.testing.assert_allclose(
        prediction.vertices[:, :2] * scale + [dx, dy], prediction.project(prediction.vertices), rtol=1e-4
    )


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_mesh_files_stand_upright_and_keep_their_orientation(
    prediction: Prediction, tmp_path: Path, suffix: str
) -> None:
    path = prediction.save(tmp_path / "deep" / f"mesh{suffix}")
    mesh = trimesh.load(path, force="mesh")
    assert mesh.bounds[0][1] == pytest.approx(0.0, abs=1e-5)  # feet at 0 ...
    assert mesh.bounds[1][1] == pytest.approx(1.8, abs=1e-5)  # ... head above
    assert mesh.volume == pytest.approx(0.5 * 1.8 * 0.3, rel=1e-4)  # positive: faces still look outwards
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_npz_holds_everything(prediction: Prediction, tmp_path: Path) -> None:
    with np.load(prediction.save(tmp_path / "all.npz")) as data:
        np.testing.assert_array_equal(data["vertices"], prediction.vertices)
        np.testing.assert_array_equal(data["camera"], prediction.camera)
        np.testing.assert_array_equal(data["crop_window"], [100, 50, 400])
        assert data["joint_names"].tolist() == ["Head", "Foot"]


def test_unknown_suffix_is_refused_and_writes_nothing(prediction: Prediction, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot save as '\.fbx'; accepted: \.glb"):
        prediction.save(tmp_path / "mesh.fbx")
    assert list(tmp_path.iterdir()) == []
