"""Labels as the released training loops have them, against NumPy."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from test_published import fake_model
from test_tsv_evaluation import data_set, made_up_mesh

from fastmetro.data.ground_truth import GroundTruth
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.meshes.mano import MANO

FINGERS = [(13, 14, 15, 745), (1, 2, 3, 317), (4, 5, 6, 444), (10, 11, 12, 556), (7, 8, 9, 673)]
"""Thumb to little finger: bones of MANO, and the vertex of the tip."""


def batch_of(folder: Path, kind: str, count: int = 5) -> TsvBatch:
    samples = TsvDataset(data_set(folder, kind, count), kind, size=32)
    return samples.collate([samples[row] for row in range(count)])


def hand_model(folder: Path) -> MANO:
    path = folder / "mano.pkl"
    path.write_bytes(pickle.dumps(fake_model("mano"), 2))
    return MANO(path)


def test_published_hands_are_labelled_by_their_skeleton(tmp_path: Path) -> None:
    """Relative to its wrist, the middle fingertip at vertex 444; rows' own 3D joints do not matter."""
    batch, model, mesh = batch_of(tmp_path / "data", "hand"), hand_model(tmp_path), made_up_mesh("mano")
    labels = GroundTruth(mesh, model, compat="published")(batch)
    vertices, bones = (points.double().numpy() for points in model(batch.pose, batch.betas))
    for row in range(5):
        fingers = [[*bones[row][[a, b, c]], vertices[row][tip]] for a, b, c, tip in FINGERS]
        joints = np.array([bones[row][0], *(joint for finger in fingers for joint in finger)])
        np.testing.assert_allclose(labels.joints_3d[row, :, :3], joints - bones[row][0], atol=1e-5)
        np.testing.assert_allclose(labels.vertices[row], vertices[row] - bones[row][0], atol=1e-5)
    assert (labels.joints_3d[..., 3] == 1).all() and torch.equal(labels.has_joints_3d, batch.has_smpl)
    assert not torch.equal(batch.has_smpl, batch.has_joints_3d)
    nothing = replace(batch, joints_3d=torch.zeros_like(batch.joints_3d))
    assert torch.equal(GroundTruth(mesh, model, compat="published")(nothing).joints_3d, labels.joints_3d)


def test_hands_are_labelled_by_their_rows(tmp_path: Path) -> None:
    batch = batch_of(tmp_path / "data", "hand")
    labels = GroundTruth(made_up_mesh("mano"), hand_model(tmp_path))(batch)
    torch.testing.assert_close(labels.joints_3d[..., :3], batch.joints_3d[..., :3] - batch.joints_3d[:, :1, :3])
    assert torch.equal(labels.has_joints_3d, batch.has_joints_3d)


def test_published_joints_count_without_their_root(tmp_path: Path) -> None:
    """A hip without confidence takes the other joints' only by default."""
    batch = batch_of(tmp_path / "data", "body")
    batch.joints_3d[1, 2, 3] = 0
    mesh = made_up_mesh("smpl")
    default, published = (
        GroundTruth(mesh, joints_only=True, compat=compat)(batch).joints_3d[..., 3] for compat in (None, "published")
    )
    expected = torch.ones(5, 14)
    expected[1, 2] = 0
    assert torch.equal(published, expected)
    expected[1] = 0
    assert torch.equal(default, expected)
