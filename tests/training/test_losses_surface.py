"""Edges and normals on meshes where the answer is known, and the levels that are refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from loss_cases import random_labels, random_outputs, small_mesh

from fastmetro.meshes.hierarchy import face_edges
from fastmetro.meshes.mesh import MeshLevel
from fastmetro.training.losses import LossWeights, MeshRecoveryLoss
from fastmetro.training.losses.surface import SurfaceTerms

NAMES = ("edge_lengths", "edge_self", "normals")
HERE = torch.tensor([True])


def level(faces, count):
    faces = np.array(faces)
    return MeshLevel(None, faces, face_edges(faces), np.arange(count))


SQUARE = level([[0, 1, 2], [0, 2, 3]], 4)  # unit square in the plane z = 0, its diagonal has two faces
CORNERS = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]])


def test_a_square_scaled_by_three():
    sums = SurfaceTerms(SQUARE, normals=True)(3 * CORNERS, CORNERS, HERE, NAMES)
    lengths = 3 * np.array([1, 1, 1, 1, math.sqrt(2)])
    assert float(sums["edge_lengths"]) == pytest.approx(2 * (4 + math.sqrt(2)))
    assert float(sums["edge_self"]) == pytest.approx(np.abs(lengths - lengths.mean()).sum(), rel=1e-5)
    assert float(sums["normals"]) == 0


def test_a_face_turned_by_45_degrees():
    turned = CORNERS.clone()
    turned[0, 2:, 1:] = math.sqrt(0.5)  # about the x axis
    sums = SurfaceTerms(SQUARE, normals=True)(turned, CORNERS, HERE, NAMES)
    assert float(sums["edge_lengths"]) == pytest.approx(0, abs=1e-6)
    # Two sides along y stand at 45 degrees to the true normal; the diagonal, in both faces, has z = sqrt(0.5) of
    # sqrt(2).
    assert float(sums["normals"]) == pytest.approx(2 * math.sqrt(0.5) + 2 * 0.5, rel=1e-5)


def test_the_diagonal_counts_twice_per_face_and_a_length_is_never_zero_as_published():
    terms = SurfaceTerms(SQUARE, normals=False, published=True, per_face=True)
    assert terms.sizes["edge_lengths"] == 6
    sums = terms(3 * CORNERS, CORNERS, HERE, NAMES[:2])
    assert float(sums["edge_lengths"]) == pytest.approx(2 * (4 + 2 * math.sqrt(2)), rel=1e-5)
    collapsed = SurfaceTerms(SQUARE, normals=False, published=True)(0 * CORNERS, CORNERS, HERE, NAMES[:2])
    assert float(collapsed["edge_self"]) == pytest.approx(5e-4, rel=1e-5)


@pytest.mark.parametrize("published", [False, True])
def test_a_mesh_that_has_collapsed_has_finite_gradients(published):
    prediction = torch.zeros(1, 4, 3, requires_grad=True)
    sums = SurfaceTerms(SQUARE, normals=True, published=published)(prediction, CORNERS, HERE, NAMES)
    sum(sums.values()).backward()
    assert torch.isfinite(prediction.grad).all()
    flat = torch.zeros(1, 4, 3)  # true faces without an area have no normal
    moving = CORNERS.clone().requires_grad_()
    sums = SurfaceTerms(SQUARE, normals=True, published=published)(moving, flat, HERE, NAMES)
    sum(sums.values()).backward()
    assert sums["normals"].detach() == 0 and torch.isfinite(moving.grad).all()


def test_three_faces_at_one_edge():
    fan = level([[0, 1, 2], [0, 1, 3], [0, 1, 4]], 5)
    truth = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]])
    prediction = truth.clone()
    prediction[0, 1] = torch.tensor([0.0, 0.6, 0.8])  # the shared edge; the true normals are z, y and (y - z) / sqrt(2)
    sums = SurfaceTerms(fan, normals=True)(prediction, truth, HERE, NAMES)
    normals = np.array([[0, 0, 1.0], [0, 1, 0], [0, math.sqrt(0.5), -math.sqrt(0.5)]])
    expected = 0.0
    for normal, tip in zip(normals, truth[0, 2:].numpy(), strict=True):
        for vector in (np.array([0, 0.6, 0.8]), tip, tip - np.array([0, 0.6, 0.8])):
            expected += abs(vector @ normal) / np.linalg.norm(vector)
    assert float(sums["normals"]) == pytest.approx(expected, rel=1e-5)


def test_a_level_of_edges_alone_has_lengths_but_no_normals():
    mesh = small_mesh()
    bare = tuple(dataclasses.replace(part, faces=None) for part in mesh.levels)
    mesh = dataclasses.replace(mesh, levels=bare)
    _, terms = MeshRecoveryLoss(mesh, LossWeights(edge_lengths=1.0))(random_outputs(mesh, 2), random_labels(mesh, 2))
    assert terms["edge_lengths"] > 0
    with pytest.raises(ValueError, match="normals need a level with faces"):
        MeshRecoveryLoss(mesh, LossWeights(normals=1.0))


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"surface_level must be one of \('fine', 'coarse'\) .*'intermediate'"):
        MeshRecoveryLoss(small_mesh("hand"), LossWeights(normals=1.0))
    with pytest.raises(ValueError, match="edges are those of its faces"):
        SurfaceTerms(dataclasses.replace(SQUARE, edges=SQUARE.edges[:-1]), normals=True)
    with pytest.raises(ValueError, match="a level with edges"):
        SurfaceTerms(dataclasses.replace(SQUARE, edges=SQUARE.edges[:0]), normals=False)
