"""Anny's body and hand: against stored outputs of Anny, and against Anny itself where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmetro import load_mesh
from fastmetro.meshes import anny as ours
from fastmetro.meshes.anatomy import pose_limits
from fastmetro.meshes.anny import AnnyBody, AnnyHand, AnnyModel

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # metres


@pytest.fixture(scope="module", params=["body", "hand"])
def part(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(part) -> AnnyModel:
    return AnnyBody() if part == "body" else AnnyHand()


def test_golden(device, part, model) -> None:
    """Six states of all ages; every 29th vertex; Anny 0.6.2 computed them in float64."""
    with np.load(Path(__file__).parent / "data/anny_golden.npz", allow_pickle=False) as golden:
        pose, phenotypes = (torch.from_numpy(golden[f"{part}_{key}"]).to(device) for key in ("pose", "phenotypes"))
        vertices, bones = (torch.from_numpy(golden[f"{part}_{key}"]) for key in ("vertices", "bones"))
    got_vertices, got_bones = model.to(device)(pose, phenotypes)
    model.cpu()
    assert (got_vertices[:, ::29].cpu() - vertices).norm(dim=-1).max() < TOLERANCE
    assert (got_bones.cpu() - bones).norm(dim=-1).max() < TOLERANCE


def test_against_anny(part, model) -> None:
    pytest.importorskip("anny", reason="anny is not installed")
    sys.path.insert(0, str(ROOT / "tools"))
    import export_anny

    theirs = export_anny.anny_model(part)
    pose, phenotypes = export_anny.random_states(theirs, 8, 0.4, seed=17)
    vertices, bones = export_anny.anny_output(theirs, part, pose, phenotypes)
    got_vertices, got_bones = model(torch.from_numpy(pose).float(), torch.from_numpy(phenotypes).float())
    assert np.linalg.norm(got_vertices.numpy() - vertices, axis=-1).max() < TOLERANCE
    assert np.linalg.norm(got_bones.numpy() - bones, axis=-1).max() < TOLERANCE


def test_shape_is_interpolated_between_anchors(model) -> None:
    corners = torch.from_numpy(ours.anchor_corners()).float()
    coefficients = model.shape_coefficients(corners)
    torch.testing.assert_close(coefficients, model.corner_coefficients, rtol=0, atol=1e-6)
    ends = torch.tensor([[0.0, 1 / 3, 0.5, 0.5, 0.0, 1.0], [0.0, 2 / 3, 0.5, 0.5, 0.0, 1.0]])
    middle = model.shape_coefficients(ends.mean(0, keepdim=True))
    torch.testing.assert_close(middle[0], model.shape_coefficients(ends).mean(0), rtol=0, atol=1e-6)
    beyond = model.shape_coefficients(torch.tensor([[2.0, 9.0, 0.5, 0.5, -1.0, 1.0]]))
    torch.testing.assert_close(beyond, model.shape_coefficients(torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.0, 1.0]])))


def test_gradients_reach_pose_and_phenotypes(model) -> None:
    pose = torch.zeros(2, model.num_bones, 3, requires_grad=True)
    phenotypes = torch.tensor([[0.3, 0.7, 0.4, 0.6, 0.5, 0.2]], requires_grad=True)
    vertices, _ = model(pose, phenotypes)
    (vertices * torch.linspace(-1, 1, model.num_vertices)[:, None]).sum().backward()
    assert pose.grad is not None and torch.isfinite(pose.grad).all() and pose.grad[:, 1:].abs().max() > 0
    assert phenotypes.grad is not None and torch.isfinite(phenotypes.grad).all() and (phenotypes.grad != 0).all()


def test_phenotypes_mean_what_they_say() -> None:
    body = AnnyBody()

    def height(**values: float) -> float:
        row = [values.get(name, value) for name, value in zip(ours.PHENOTYPES, ours.DEFAULT_PHENOTYPES, strict=True)]
        vertices, _ = body(None, torch.tensor([row]))
        return float(vertices[0, :, 1].max() - vertices[0, :, 1].min())

    assert 1.5 < height() < 2.0
    assert height(age=0.0) < 1.0 < height(age=1 / 3) < height()
    assert height(height=0.1) < height(height=0.9)
    samples = ours.sample_phenotypes(torch.rand(64, 6, generator=torch.Generator().manual_seed(0)))
    vertices, _ = body(None, samples)
    heights = vertices[..., 1].amax(1) - vertices[..., 1].amin(1)
    assert heights.min() > 1.2 and heights.max() < 2.3


def test_axes_of_the_body() -> None:
    mesh = load_mesh("anny-body")
    joints = dict(zip(mesh.joint_names, mesh.joint_regressor @ mesh.vertices, strict=True))
    assert joints["L_Shoulder"][0] > 0 > joints["R_Shoulder"][0]  # its left is +x
    assert joints["Head"][1] > joints["Neck"][1] > joints["L_Hip"][1] > joints["L_Knee"][1] > joints["L_Ankle"][1]
    feet = mesh.vertices[mesh.vertices[:, 1] < joints["L_Ankle"][1]]
    assert feet[:, 2].max() > 0.15 > -feet[:, 2].min()  # toes point to +z
    for name in ("Ankle", "Knee", "Hip", "Wrist", "Elbow", "Shoulder"):
        assert np.allclose(joints[f"R_{name}"], joints[f"L_{name}"] * [-1, 1, 1], atol=2e-3)


def test_joints_follow_the_bones() -> None:
    """The regressed joints stay at the bones they belong to under random poses."""
    for model, names in (
        (AnnyBody(), {"L_Knee": "lowerleg01.L", "R_Elbow": "lowerarm01.R", "L_Wrist": "wrist.L", "Neck": "neck01"}),
        (
            AnnyHand(),
            {"Wrist": "wrist.R", "Thumb_3": "finger1-3.R", "Middle_2": "finger3-2.R", "Pinky_1": "finger5-1.R"},
        ),
    ):
        mesh = load_mesh("anny-body" if len(names) and "Neck" in names else "anny-hand")
        limits = pose_limits(model)
        uniform = torch.rand(16, *limits.low.shape, generator=torch.Generator().manual_seed(4))
        vertices, bones = model(limits.pose(limits.angles(0.25 + 0.5 * uniform)))
        joints = np.einsum("jm,bmd->bjd", mesh.joint_regressor.toarray(), vertices.numpy())
        for joint, bone in names.items():
            gap = joints[:, mesh.joint_names.index(joint)] - bones[:, model.bone_names.index(bone)].numpy()
            assert np.linalg.norm(gap, axis=-1).mean() < (0.03 if mesh.part == "body" else 0.006), joint


def test_mesh_matches_its_model(part, model) -> None:
    mesh = load_mesh(f"anny-{part}")
    vertices, _ = model()
    assert np.abs(vertices[0].numpy() - mesh.vertices).max() < TOLERANCE
    assert np.array_equal(model.faces.numpy(), mesh.faces)
    assert len(mesh.joint_names) == (14 if part == "body" else 21)
    assert np.abs(mesh.joint_regressor.sum(1) - 1).max() < 1e-6 and mesh.joint_regressor.data.min() >= 0
    assert mesh.uv is not None and mesh.uv_faces is not None
    assert mesh.uv_faces.shape == mesh.faces.shape and mesh.uv_faces.max() == len(mesh.uv) - 1
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1


def test_hand_closes_towards_the_palm() -> None:
    hand = AnnyHand()
    mesh = load_mesh("anny-hand")
    limits = pose_limits(hand)
    angles = torch.zeros(1, *limits.low.shape)
    angles[..., 0] = limits.high[:, 0]
    vertices, _ = hand(limits.pose(angles))
    tips = [mesh.joint_names.index(f"{finger}_4") for finger in ("Index", "Middle", "Ring", "Pinky")]
    fist = mesh.joint_regressor @ vertices[0].numpy()
    rest = mesh.joint_regressor @ mesh.vertices
    assert np.all(rest[tips, 1] > 0.13) and rest[4, 0] > 0.05  # fingers up, thumb to +x
    assert np.all(fist[tips, 1] < 0.12) and np.all(fist[tips, 2] > 0)  # curled up in front of the palm, +z


def test_limbs_flex_the_way_they_should() -> None:
    body = AnnyBody()
    mesh = load_mesh("anny-body")
    limits = pose_limits(body)
    rest = mesh.joint_regressor @ mesh.vertices

    def moved(bone: str, axis: int, joint: str) -> np.ndarray:
        angles = torch.zeros(1, *limits.low.shape)
        angles[0, limits.bone_names.index(bone), axis] = 0.8
        vertices, _ = body(limits.pose(angles))
        index = mesh.joint_names.index(joint)
        return mesh.joint_regressor[index] @ vertices[0].numpy() - rest[index]

    for side, sign in (("L", 1), ("R", -1)):
        assert moved(f"upperleg01.{side}", 0, f"{side}_Knee")[0, 2] > 0.2  # hip flexion: knee forward
        assert moved(f"lowerleg01.{side}", 0, f"{side}_Ankle")[0, 2] < -0.2  # knee flexion: ankle back
        assert sign * moved(f"upperleg01.{side}", 1, f"{side}_Knee")[0, 0] > 0.2  # abduction: knee out
        assert moved(f"upperarm01.{side}", 1, f"{side}_Elbow")[0, 1] > 0.1  # arm up
        assert moved(f"upperarm01.{side}", 0, f"{side}_Elbow")[0, 2] > 0.1  # arm forward
        assert moved(f"lowerarm01.{side}", 0, f"{side}_Wrist")[0, 2] > 0.05  # elbow flexion: hand forward
    assert moved("spine05", 0, "Head")[0, 2] > 0.2 and moved("head", 0, "Head")[0, 2] > 0.05


def test_limits_are_symmetric_and_contain_rest(model) -> None:
    limits = pose_limits(model)
    assert (limits.low <= 0).all() and (limits.high >= 0).all() and (limits.high - limits.low).max() < 3.2
    torch.testing.assert_close(limits.axes.norm(dim=-1), torch.ones_like(limits.low))
    uniform = torch.rand(5, *limits.low.shape, generator=torch.Generator().manual_seed(0))
    angles = limits.angles(uniform)
    assert (angles >= limits.low - 1e-6).all() and (angles <= limits.high + 1e-6).all()
    pose = limits.pose(angles)
    torch.testing.assert_close(torch.det(pose), torch.ones(5, model.num_bones))
    rest = limits.pose(limits.angles(torch.full_like(uniform, 0.5)))
    torch.testing.assert_close(rest, torch.eye(3).expand_as(rest))
    with pytest.raises(ValueError, match="angles must be"):
        limits.pose(angles[:, :3])
    if isinstance(model, AnnyBody):  # a mirrored pose gives the mirrored body
        left = [i for i, name in enumerate(limits.bone_names) if name.endswith(".L")]
        right = [limits.bone_names.index(f"{limits.bone_names[i][:-1]}R") for i in left]
        one = torch.zeros(2, *limits.low.shape)
        one[0, left], one[1, right] = angles[0, left], angles[0, left]
        _, bones = model(limits.pose(one))
        other = [name.translate(str.maketrans("LR", "RL")) for name in model.bone_names]
        swap = [model.bone_names.index(name) for name in other]
        torch.testing.assert_close(bones[1, swap] * torch.tensor([-1.0, 1, 1]), bones[0], rtol=0, atol=4e-3)


def test_needs_neither_anny_nor_warp() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('anny', 'warp', 'roma', 'trimesh', 'matplotlib')))\n"
        "import fastmetro; fastmetro.load_mesh('anny-body'); fastmetro.load_mesh('anny-hand')\n"
        "from fastmetro.meshes.anny import AnnyHand; AnnyHand()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_assets_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "fastmetro/assets").glob("anny_*.npz")}
    assert set(sizes) == {"anny_body.npz", "anny_hand.npz"}
    assert sum(sizes.values()) < 6e6


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown mesh 'anny'"):
        load_mesh("anny")
    with pytest.raises(ValueError, match="needs data="):
        load_mesh("smpl")
    with pytest.raises(ValueError, match="data= is for"):
        load_mesh("anny-body", data="somewhere")
    with pytest.raises(FileNotFoundError, match="no mesh file"):
        load_mesh("absent.obj")
    with pytest.raises(ValueError, match="phenotypes must be"):
        AnnyHand().shape_coefficients(torch.zeros(2, 5))
