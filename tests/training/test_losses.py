from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from fastmetro.data.labels import MeshLabels
from fastmetro.training.losses import LossWeights, MeshRecoveryLoss, masked_l1, weak_perspective

BATCH, FINE, MIDDLE, COARSE, JOINTS = 3, 12, 7, 4, 5


def _mesh():
    rng = np.random.default_rng(0)
    regressor = rng.uniform(size=(JOINTS, FINE)).astype(np.float32)
    levels = (
        SimpleNamespace(kept=np.arange(FINE)),
        SimpleNamespace(kept=np.array([0, 2, 3, 5, 8, 10, 11])),
        SimpleNamespace(kept=np.array([1, 2, 4, 6])),
    )
    return SimpleNamespace(
        name="test", levels=levels, joint_regressor=sp.csr_matrix(regressor / regressor.sum(1)[:, None])
    )


def _labels(seed=0, **flags):
    generator = torch.Generator().manual_seed(seed)
    vertices = torch.randn(BATCH, FINE, 3, generator=generator)
    joints = torch.from_numpy(_mesh().joint_regressor.toarray()) @ vertices
    camera = torch.rand(BATCH, 3, generator=generator) + 0.5
    image = torch.cat([weak_perspective(joints, camera), torch.ones(BATCH, JOINTS, 1)], dim=-1)
    there = torch.ones(BATCH, dtype=torch.bool)
    given = {
        name: torch.tensor(flags.get(name, [True] * BATCH))
        for name in ("has_vertices", "has_joints_3d", "has_joints_2d")
    }
    assert there.shape == given["has_vertices"].shape
    return MeshLabels(vertices, joints, image, camera, **given)


def _perfect(labels):
    kept = [level.kept for level in _mesh().levels]
    middle = labels.vertices[:, kept[1]]
    return {
        "pred_cam": labels.camera,
        "pred_3d_joints": labels.joints_3d,
        "pred_3d_vertices_fine": labels.vertices,
        "pred_3d_vertices_intermediate": middle,
        "pred_3d_vertices_coarse": middle[:, kept[2]],
    }


def test_the_truth_has_no_loss():
    labels = _labels()
    total, terms = MeshRecoveryLoss(_mesh())(_perfect(labels), labels)
    assert total < 1e-5 and all(value < 1e-5 for value in terms.values())
    assert set(terms) == {
        "token_joints_3d", "mesh_joints_3d", "token_joints_2d", "mesh_joints_2d",
        "vertices_fine", "vertices_intermediate", "vertices_coarse",
    }  # fmt: skip


def test_the_total_is_the_weighted_sum_computed_by_hand():
    labels = _labels()
    outputs = {name: value + 0.1 * torch.randn_like(value) for name, value in _perfect(labels).items()}
    weights = LossWeights(2.0, 3.0, 5.0, 7.0, 11.0, 0.5, 0.3, 0.2)
    total, _ = MeshRecoveryLoss(_mesh(), weights)(outputs, labels)
    kept = [level.kept for level in _mesh().levels]
    truth = {"fine": labels.vertices.double().numpy()}
    truth["intermediate"] = truth["fine"][:, kept[1]]
    truth["coarse"] = truth["intermediate"][:, kept[2]]
    value = {name: tensor.double().numpy() for name, tensor in outputs.items()}
    mesh_joints = _mesh().joint_regressor.toarray() @ value["pred_3d_vertices_fine"]
    camera = value["pred_cam"]

    def flat(points):
        return camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])

    goal, image = labels.joints_3d.double().numpy(), labels.joints_2d[..., :2].double().numpy()
    expected = 2 * np.abs(value["pred_3d_joints"] - goal).mean() + 3 * np.abs(mesh_joints - goal).mean()
    expected += 7 * np.abs(flat(value["pred_3d_joints"]) - image).mean() + 11 * np.abs(flat(mesh_joints) - image).mean()
    for level, share in (("fine", 0.5), ("intermediate", 0.3), ("coarse", 0.2)):
        expected += 5 * share * np.abs(value[f"pred_3d_vertices_{level}"] - truth[level]).mean()
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_absent_labels_count_for_nothing_even_when_they_are_nan():
    labels = _labels(has_vertices=[True, False, True], has_joints_3d=[False, False, True])
    labels.vertices[1] = float("nan")
    labels.joints_3d[:2] = float("nan")
    outputs = {name: torch.randn_like(value).requires_grad_() for name, value in _perfect(_labels()).items()}
    total, terms = MeshRecoveryLoss(_mesh())(outputs, labels)
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(value).all() for value in terms.values())
    assert all(torch.isfinite(value.grad).all() for value in outputs.values())
    alone = (outputs["pred_3d_joints"][2] - labels.joints_3d[2]).abs().mean()
    torch.testing.assert_close(terms["token_joints_3d"], alone)


def test_no_labelled_sample_gives_zero_and_confidence_weighs_joints():
    prediction = torch.randn(2, 4, 2, requires_grad=True)
    loss = masked_l1(prediction, torch.zeros(2, 4, 2), torch.tensor([False, False]))
    loss.backward()
    assert loss == 0 and prediction.grad.abs().max() == 0
    confidence = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0]])
    loss = masked_l1(prediction, torch.zeros(2, 4, 2), torch.tensor([True, True]), confidence)
    expected = (prediction[0, 0].abs().sum() + 0.5 * prediction[1, 1].abs().sum()) / 3
    torch.testing.assert_close(loss, expected)
    loss = masked_l1(prediction, torch.zeros(2, 4, 2), torch.tensor([True, True]), 0.1 * confidence)
    torch.testing.assert_close(loss, expected)  # a mean also where the weights do not sum to 1


def test_autocast_does_not_reach_the_loss(device):
    labels = _labels().to(device)
    loss = MeshRecoveryLoss(_mesh()).to(device)
    outputs = {name: value + 0.01 for name, value in _perfect(labels).items()}
    with torch.autocast(device.type, torch.bfloat16):
        total, _ = loss(outputs, labels)
    expected, _ = loss(outputs, labels)
    assert total.dtype == torch.float32 and torch.equal(total, expected)


def test_a_mesh_without_joints_is_refused():
    mesh = _mesh()
    mesh.joint_regressor = None
    with pytest.raises(ValueError, match="joint regressor"):
        MeshRecoveryLoss(mesh)
