"""The SMPL stage against loops, with a body model made up here (SMPL's own files are licensed)."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from test_published import fake_model

from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.body import axis_angle_to_matrix
from fastmetro.meshes.smpl import SMPL
from fastmetro.training.losses import SMPLStageLoss, SMPLStageWeights, weak_perspective

VERTICES, BONES, JOINTS, BATCH = 6890, 24, 5, 6
ROOTS = (2, 3)
TERMS = ("smpl_rotations", "smpl_betas", "smpl_joints_3d", "smpl_joints_2d", "smpl_vertices")


@pytest.fixture(scope="module")
def smpl(tmp_path_factory):
    path = tmp_path_factory.mktemp("smpl") / "model.pkl"
    path.write_bytes(pickle.dumps(fake_model("smpl"), 2))
    return SMPL(path)


@pytest.fixture(scope="module")
def mesh():
    def regressor(rows, seed):
        matrix = sp.random(rows, VERTICES, 0.002, random_state=seed).tocsr()
        return sp.csr_matrix(matrix / matrix.sum(1), dtype=np.float32)

    return SimpleNamespace(
        name="smpl", part="body", num_vertices=VERTICES, joint_regressor=regressor(JOINTS, 1), root_joints=ROOTS,
        regressors={"h36m": regressor(7, 2)},
    )  # fmt: skip


def batch(seed=0, size=BATCH):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(size, *shape, generator=generator)

    def rotations():
        return axis_angle_to_matrix(0.5 * random(BONES, 3))

    outputs = {"pred_rotmat": rotations(), "pred_betas": random(10), "pred_cam": random(3)}
    confidence = (torch.arange(size * JOINTS).view(size, JOINTS, 1) % 4).clamp(max=2) / 2
    confidence_3d = confidence.clone()
    confidence_3d[1:, list(ROOTS)] = 1.0
    absent = torch.arange(size)
    labels = MeshLabels(
        vertices=random(VERTICES, 3),
        joints_3d=torch.cat([random(JOINTS, 3), confidence_3d], dim=-1),
        joints_2d=torch.cat([random(JOINTS, 2), confidence], dim=-1),
        camera=torch.ones(size, 3),
        has_vertices=absent % 3 > 0,
        has_joints_3d=absent % 4 < 3,
        has_joints_2d=absent % 5 > 0,
        pose_rotations=rotations(),
        betas=random(10),
    )
    return outputs, labels


def with_nan(labels, published):
    changed = {}
    for name in ("vertices", "pose_rotations", "betas"):
        changed[name] = getattr(labels, name).clone()
        changed[name][~labels.has_vertices] = float("nan")
    changed["joints_3d"], changed["joints_2d"] = labels.joints_3d.clone(), labels.joints_2d.clone()
    changed["joints_3d"][~labels.has_joints_3d] = float("nan")
    if not published:
        changed["joints_2d"][~labels.has_joints_2d] = float("nan")
    return dataclasses.replace(labels, **changed)


def loops(vertices, mesh, outputs, labels, published):
    """The five means; ``vertices`` are those of the predicted parameters."""
    regressor = mesh.joint_regressor.toarray().astype(np.float64)
    pelvis = mesh.regressors["h36m"].toarray().astype(np.float64)[0]
    sums, counts = dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0.0)
    value = {name: tensor.detach().double().numpy() for name, tensor in outputs.items()}
    label = {name: tensor.double().numpy() for name, tensor in vars(labels).items()}
    for item in range(len(vertices)):
        body, camera = vertices[item].detach().double().numpy(), value["pred_cam"][item]
        if labels.has_vertices[item]:
            truth = label["vertices"][item]
            sums["smpl_rotations"] += ((value["pred_rotmat"][item] - label["pose_rotations"][item]) ** 2).sum()
            sums["smpl_betas"] += ((value["pred_betas"][item] - label["betas"][item]) ** 2).sum()
            sums["smpl_vertices"] += np.abs((body - pelvis @ body) - (truth - pelvis @ truth)).sum()
            counts["smpl_rotations"] += BONES * 9
            counts["smpl_betas"] += 10
            counts["smpl_vertices"] += VERTICES * 3
        joints, goal = regressor @ body, label["joints_3d"][item]
        centred = joints - (joints[2] + joints[3]) / 2
        projected = joints - pelvis @ body if published else centred
        roots_known = goal[2, 3] > 0 and goal[3, 3] > 0
        if labels.has_joints_3d[item] and (published or roots_known):
            for joint in range(JOINTS):
                error = np.abs(centred[joint] - (goal[joint, :3] - (goal[2, :3] + goal[3, :3]) / 2)).sum()
                sums["smpl_joints_3d"] += goal[joint, 3] * error
                counts["smpl_joints_3d"] += 3 * (1 if published else goal[joint, 3])
        for joint in range(JOINTS):
            x, y, visible = label["joints_2d"][item, joint]
            if published or labels.has_joints_2d[item]:
                point = camera[0] * (projected[joint, :2] + camera[1:])
                sums["smpl_joints_2d"] += visible * (abs(point[0] - x) + abs(point[1] - y))
                counts["smpl_joints_2d"] += 2 * (1 if published else visible)
    return {name: sums[name] / counts[name] for name in TERMS}


@pytest.mark.parametrize("compat", [None, "published"])
def test_terms_against_loops(smpl, mesh, compat, device):
    published = compat == "published"
    outputs, labels = batch()
    loss = SMPLStageLoss(smpl, mesh, compat=compat).to(device)
    moved = {name: value.to(device).requires_grad_() for name, value in outputs.items()}
    total, terms = loss(moved, with_nan(labels, published).to(device))
    vertices, _ = smpl(moved["pred_rotmat"], moved["pred_betas"])
    expected = loops(vertices.cpu(), mesh, outputs, labels, published)
    assert tuple(terms) == TERMS == loss.term_names
    for name, value in terms.items():
        np.testing.assert_allclose(float(value), expected[name], rtol=3e-5, err_msg=name)
    by_hand = sum(value * (0.1 if name == "smpl_betas" else 1.0) for name, value in expected.items())
    np.testing.assert_allclose(float(total.detach()), by_hand, rtol=3e-5)
    total.backward()
    assert moved["pred_cam"].grad is None  # the camera is not trained by this stage
    for name in ("pred_rotmat", "pred_betas"):
        grad = moved[name].grad
        assert torch.isfinite(grad).all() and (grad.flatten(1).abs().amax(dim=1) > 0).sum() >= 5


def test_gradients_against_differences(smpl, mesh):
    outputs, labels = batch(1, size=3)
    loss = SMPLStageLoss(smpl, mesh).double()
    try:
        rotations, betas = outputs["pred_rotmat"].double(), outputs["pred_betas"].double()
        labels = with_nan(labels, False)

        def total(rotations, betas):
            camera = outputs["pred_cam"].double()
            return loss({"pred_rotmat": rotations, "pred_betas": betas, "pred_cam": camera}, labels)[0]

        inputs = (rotations.requires_grad_(), betas.requires_grad_())
        assert torch.autograd.gradcheck(total, inputs, fast_mode=True)
    finally:
        smpl.float()


def test_the_true_parameters_have_no_loss(smpl, mesh):
    outputs, labels = batch()
    vertices, _ = smpl(outputs["pred_rotmat"], outputs["pred_betas"])
    joints = torch.from_numpy(mesh.joint_regressor.toarray()) @ vertices
    centred = joints - joints[:, list(ROOTS)].mean(dim=1, keepdim=True)
    there, ones = torch.ones(BATCH, dtype=torch.bool), torch.ones(BATCH, JOINTS, 1)
    image = torch.cat([weak_perspective(centred, outputs["pred_cam"]), ones], dim=-1)
    labels = MeshLabels(
        vertices + 0.3, joints - 2.0, image, outputs["pred_cam"], there, there, there, outputs["pred_rotmat"],
        outputs["pred_betas"],
    )  # fmt: skip
    total, _ = SMPLStageLoss(smpl, mesh)(outputs, labels)
    assert total < 1e-5


@pytest.mark.parametrize("compat", [None, "published"])
def test_no_labels_and_shares_of_a_batch(smpl, mesh, compat):
    loss = SMPLStageLoss(smpl, mesh, compat=compat)
    outputs, labels = batch(2)
    labels = with_nan(labels, compat == "published")

    def run(part, counts=None, labels=labels):
        fields = {name: value[part] for name, value in vars(labels).items()}
        leaves = {name: value[part].clone().requires_grad_() for name, value in outputs.items()}
        total, _ = loss(leaves, MeshLabels(**fields), counts)
        total.backward()
        return total.detach(), leaves["pred_rotmat"].grad, leaves["pred_betas"].grad

    whole = run(slice(None))
    counts = loss.counts(labels) / 2
    halves = [run(part, counts) for part in (slice(0, 2), slice(2, BATCH))]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole[0])
    for place in (1, 2):
        together = torch.cat([half[place] for half in halves]) / 2
        torch.testing.assert_close(together, whole[place], rtol=1e-4, atol=1e-7)
    none = torch.zeros(BATCH, dtype=torch.bool)
    image = torch.zeros_like(labels.joints_2d)
    absent = dataclasses.replace(labels, has_vertices=none, has_joints_3d=none, has_joints_2d=none, joints_2d=image)
    total, *grads = run(slice(None), labels=absent)
    assert total == 0 and all((grad == 0).all() for grad in grads)


def test_totals(smpl, mesh):
    stage, other = torch.tensor(2.0), torch.tensor(3.0)
    assert SMPLStageLoss(smpl, mesh).total(stage, other) == 1000 * 2 + 3
    frozen = SMPLStageLoss(smpl, mesh, SMPLStageWeights.published_h36m())
    assert frozen.total(stage.double(), other.double()) == 1000 * 2 + 1e-8 * 3


def test_half_precision_is_computed_in_float32(smpl, mesh):
    outputs, labels = batch(3)
    loss = SMPLStageLoss(smpl, mesh)
    rounded = {name: value.bfloat16() for name, value in outputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss(rounded, labels)
    expected, _ = loss({name: value.float() for name, value in rounded.items()}, labels)
    assert total.dtype == torch.float32 and torch.equal(total, expected)


def test_what_is_missing_is_named(smpl, mesh):
    outputs, labels = batch()
    loss = SMPLStageLoss(smpl, mesh)
    with pytest.raises(ValueError, match="pred_betas missing"):
        loss({name: value for name, value in outputs.items() if name != "pred_betas"}, labels)
    with pytest.raises(ValueError, match="labels must have pose_rotations and betas"):
        loss(outputs, dataclasses.replace(labels, betas=None))
    with pytest.raises(ValueError, match="mesh must have the 6890 vertices"):
        SMPLStageLoss(smpl, SimpleNamespace(name="other", num_vertices=778))
    with pytest.raises(ValueError, match="compat must be None or 'published'"):
        SMPLStageLoss(smpl, mesh, compat="yes")


@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_named(number):
    with pytest.raises(ValueError, match="betas must be a finite number >= 0"):
        SMPLStageWeights(betas=number)
