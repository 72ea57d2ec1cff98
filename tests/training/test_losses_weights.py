"""Weights, presets, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import random_labels, random_outputs, small_mesh

from fastmetro.training.losses import LossWeights, MeshRecoveryLoss


def test_presets_have_the_published_numbers():
    """Protocol 3.7: totals 1000, 100, 100, 100 and the weights within the groups."""
    body, hand, paper = LossWeights.published_body(), LossWeights.published_hand(), LossWeights.paper()
    for weights in (body, hand, paper):
        assert weights.token_joints_3d == weights.mesh_joints_3d == 1000
        assert weights.vertices == weights.token_joints_2d == weights.mesh_joints_2d == 100
    assert (body.coarse_share, body.intermediate_share, body.fine_share) == (0.25, 0.5, 0.25)
    assert (body.edge_lengths, body.edge_self, body.normals) == pytest.approx((500, 0.01, 10))
    assert (hand.coarse_share, hand.intermediate_share, hand.fine_share) == (0.5, 0, 0.5)
    assert (hand.edge_lengths, hand.edge_self, hand.normals) == pytest.approx((100, 0, 10))
    assert (body.surface_level, hand.surface_level) == ("intermediate", "fine")
    assert body.centred and hand.centred and not paper.centred
    assert set(paper.factors(["fine", "intermediate", "coarse"])) == {
        "token_joints_3d", "mesh_joints_3d", "token_joints_2d", "mesh_joints_2d", "vertices_fine",
    }  # fmt: skip


def test_terms_of_weight_zero_are_left_out_with_the_outputs_that_only_they_need():
    mesh = small_mesh()
    loss = MeshRecoveryLoss(mesh, LossWeights(0, 1.0, 1.0, 0, 0, 1.0, 0, 0))
    outputs = random_outputs(mesh, 3)
    fine = {"pred_3d_vertices_fine": outputs["pred_3d_vertices_fine"]}
    labels = random_labels(mesh, 3)
    total, terms = loss(fine, labels)
    assert set(terms) == {"mesh_joints_3d", "vertices_fine"} and loss.counts(labels).shape == (2,)
    torch.testing.assert_close(total, terms["mesh_joints_3d"] + terms["vertices_fine"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": LossWeights(*8 * [0.0])}, "weights must have a positive weight"),
        ({"compat": "official"}, "compat must be None or 'published', got 'official'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MeshRecoveryLoss(small_mesh(), **arguments)


@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
def test_bad_weights(number):
    with pytest.raises(ValueError, match=r"normals must be a finite number >= 0"):
        LossWeights(normals=number)
    with pytest.raises(ValueError, match="surface_level must be one of"):
        LossWeights(surface_level="medium")


def test_a_mesh_of_one_level_has_fine_vertices_only():
    mesh = small_mesh()
    loss = MeshRecoveryLoss(dataclasses.replace(mesh, levels=mesh.levels[:1]))
    assert [name for name in loss.term_names if name.startswith("vertices")] == ["vertices_fine"]
    with pytest.raises(ValueError, match="1 to 3 levels, has 0"):
        MeshRecoveryLoss(dataclasses.replace(mesh, levels=()))


def test_what_does_not_fit_the_mesh_is_named():
    mesh = small_mesh()
    loss, outputs, labels = MeshRecoveryLoss(mesh), random_outputs(mesh, 3), random_labels(mesh, 3)
    with pytest.raises(ValueError, match=r"outputs must have .*; pred_cam missing"):
        loss({name: value for name, value in outputs.items() if name != "pred_cam"}, labels)
    bad = {
        "vertices": labels.vertices[:, 1:],
        "joints_3d": labels.joints_3d[:, 1:],
        "joints_2d": labels.joints_2d[..., :2],
        "has_joints_2d": labels.has_joints_2d[1:],
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=rf"labels\.{name} must be \[3"):
            loss(outputs, dataclasses.replace(labels, **{name: value}))
    with pytest.raises(ValueError, match=r"counts must be \[7\], one for each of .*, got \[3\]"):
        loss(outputs, labels, torch.ones(3))
