"""Pictures of a training's batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.training.pictures import batch_picture
from fastmetro.training.sources import Batch

SIZE, COUNT = 64, 3


class Knowing(nn.Module):
    """A network that answers with the labels of the batch."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = self.batch.labels
        return {"pred_3d_vertices_fine": labels.vertices[: len(images)], "pred_cam": labels.camera[: len(images)]}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return load_mesh("anny-body")


@pytest.fixture(scope="module")
def batch(mesh: Mesh) -> Batch:
    made = SyntheticPeople(mesh, 3, SIZE, photographs=False)(torch.arange(COUNT + 1))
    return Batch(normalize_images(made.images), made.labels)


def rows(picture: np.ndarray) -> list[np.ndarray]:
    return np.split(picture.astype(int), len(picture) // SIZE)


def test_rows_are_images_and_what_is_drawn_on_them(mesh: Mesh, batch: Batch, device: torch.device) -> None:
    there = Batch(batch.images.to(device), batch.labels.to(device))
    picture = batch_picture(Knowing(there), there, mesh, COUNT)
    assert picture.dtype == np.uint8 and picture.shape == (3 * SIZE, COUNT * SIZE, 3)
    images, recovered, true = rows(picture)
    assert np.array_equal(recovered, true)
    for column in range(COUNT):
        part = slice(column * SIZE, (column + 1) * SIZE)
        drawn = np.abs(recovered[:, part] - images[:, part]).max(2) > 20
        joints = batch.labels.joints_2d[column].numpy()
        x, y = ((joints[joints[:, 2] > 0, :2] + 1) * (SIZE / 2)).astype(int).T
        assert drawn[y, x].mean() > 0.5 and drawn.mean() < 0.9
    plain = batch_picture(Knowing(batch), batch, mesh, COUNT)
    assert (np.abs(picture.astype(int) - plain) > 8).mean() < 0.01  # rounding decides at outlines


def test_what_cannot_be_drawn_is_left_out(mesh: Mesh, batch: Batch) -> None:
    """Vertices that are not finite, labels that are not there; without any true mesh there is no third row."""
    labels = vars(batch.labels)
    vertices = labels["vertices"].clone()
    vertices[0, 7] = float("nan")
    some = Batch(batch.images, type(batch.labels)(**{**labels, "vertices": vertices}))
    images, recovered, _ = rows(batch_picture(Knowing(some), some, mesh, COUNT))
    assert np.array_equal(recovered[:, :SIZE], images[:, :SIZE])
    assert not np.array_equal(recovered[:, SIZE:], images[:, SIZE:])
    absent = torch.zeros_like(batch.labels.has_vertices)
    none = Batch(batch.images, type(batch.labels)(**{**labels, "has_vertices": absent}))
    assert len(rows(batch_picture(Knowing(none), none, mesh, COUNT))) == 2
