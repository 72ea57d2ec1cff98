"""SMPL and MANO: meshes from the published data, models from files made up here."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from fastmetro import load_mesh
from fastmetro.meshes.body import axis_angle_to_matrix
from fastmetro.meshes.mano import MANO
from fastmetro.meshes.smpl import SMPL

SIZES = {"smpl": (6890, 24, 13776), "mano": (778, 16, 1538)}


def fake_model(name: str) -> dict:
    """Arrays shaped as in a model file, with a plausible skeleton."""
    vertices, bones, faces = SIZES[name]
    generator = np.random.default_rng(0)
    regressor = sp.random(bones, vertices, 0.01, random_state=0).toarray() + np.eye(bones, vertices)
    parents = np.array([2**32 - 1, *((bone - 1) // 2 for bone in range(1, bones))], np.int64)
    return {
        "v_template": generator.normal(size=(vertices, 3)),
        "shapedirs": 0.05 * generator.normal(size=(vertices, 3, 12)),
        "posedirs": 0.01 * generator.normal(size=(vertices, 3, 9 * (bones - 1))),
        "J_regressor": sp.csc_matrix(regressor / regressor.sum(1, keepdims=True)),
        "weights": generator.dirichlet(np.full(bones, 0.1), vertices),
        "kintree_table": np.stack([parents, np.arange(bones)]).astype(np.uint32),
        "f": generator.integers(0, vertices, (faces, 3)).astype(np.uint32),
        "hands_mean": 0.1 * generator.normal(size=3 * (bones - 1)),
        "bs_style": "lbs",
    }


def write(path, model) -> str:
    path.write_bytes(pickle.dumps(model, 2))
    return str(path)


@pytest.mark.parametrize("name", ["smpl", "mano"])
def test_model_against_loops(name, tmp_path, device) -> None:
    data = fake_model(name)
    module = (SMPL if name == "smpl" else MANO)(write(tmp_path / "model.pkl", data)).to(device)
    vertices, bones, _ = SIZES[name]
    generator = np.random.default_rng(1)
    pose, betas = 0.5 * generator.normal(size=(2, 3 * bones)), generator.normal(size=(2, 10))
    shift = generator.normal(size=(2, 3))
    full = pose + np.concatenate([np.zeros(3), data["hands_mean"]]) if name == "mano" else pose
    rotations = axis_angle_to_matrix(torch.from_numpy(full).unflatten(1, (-1, 3))).numpy()
    arguments = (torch.from_numpy(a).float().to(device) for a in (pose, betas, shift))
    got, got_joints = (part.cpu().numpy() for part in module(*arguments))
    for item in range(2):
        shaped = data["v_template"] + data["shapedirs"][..., :10] @ betas[item]
        joints = data["J_regressor"] @ shaped
        rest = shaped + data["posedirs"] @ (rotations[item, 1:] - np.eye(3)).ravel()
        world = np.zeros((bones, 4, 4))
        for bone in range(bones):
            local = np.eye(4)
            parent = (bone - 1) // 2
            local[:3, :3] = rotations[item, bone]
            local[:3, 3] = joints[bone] - (joints[parent] if bone else 0)
            world[bone] = world[parent] @ local if bone else local
        posed = np.zeros((vertices, 3))
        for bone in range(bones):
            moved = (rest - joints[bone]) @ world[bone, :3, :3].T + world[bone, :3, 3]
            posed += data["weights"][:, bone, None] * moved
        assert np.abs(got[item] - posed - shift[item]).max() < 2e-5
        assert np.abs(got_joints[item] - world[:, :3, 3] - shift[item]).max() < 2e-5
    again, _ = module(torch.from_numpy(rotations).float().to(device), torch.from_numpy(betas).float().to(device))
    assert np.abs(again.cpu().numpy() + shift[:, None] - got).max() < 2e-5
    assert module.faces.dtype == torch.int64


def test_npz_model(tmp_path) -> None:
    data = fake_model("mano")
    data["J_regressor"] = data["J_regressor"].toarray()
    np.savez(tmp_path / "model.npz", **data)
    first, second = MANO(tmp_path / "model.npz"), MANO(write(tmp_path / "model.pkl", data))
    pose, betas = torch.full((1, 48), 0.1), torch.ones(1, 10)
    torch.testing.assert_close(first(pose, betas), second(pose, betas))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("v_template", None, "v_template missing"),
        ("v_template", np.zeros((10, 3)), "v_template must be finite numbers"),
        ("weights", np.full((778, 16), np.nan), "weights must be finite"),
        ("f", np.full((5, 3), 778), "f must index 778 vertices"),
        ("f", np.zeros((5, 4), np.int64), "f must be integers"),
        ("kintree_table", np.zeros((2, 3), np.int64), "kintree_table must be"),
        ("posedirs", np.full((778, 3, 135), "x"), "posedirs must be finite numbers"),
    ],
)
def test_broken_models(key, value, message, tmp_path) -> None:
    data = fake_model("mano")
    data[key] = value
    if value is None:
        del data[key]
    with pytest.raises(ValueError, match=message):
        MANO(write(tmp_path / "model.pkl", data))


def test_absent_model(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no smpl model"):
        SMPL(tmp_path / "absent.pkl")


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data/fastmetro"


@pytest.mark.parametrize(
    ("name", "sizes", "neighbours"), [("smpl", (6890, 1723, 431), 3005), ("mano", (778, 195), 1331)]
)
def test_published_hierarchy(name, sizes, neighbours, data) -> None:
    mesh = load_mesh(name, data=data)
    assert tuple(level.num_vertices for level in mesh.levels) == sizes
    assert [matrix.shape for matrix in mesh.upsampling] == [
        (fine, coarse) for coarse, fine in zip(sizes[::-1], sizes[-2::-1], strict=False)
    ]
    assert all(np.diff(matrix.indptr).max() <= 3 for matrix in mesh.upsampling)
    size = sizes[-1]
    indices = torch.load(data / f"{name}_{size}_adjmat_indices.pt", weights_only=True)
    published = torch.zeros(size, size, dtype=torch.bool)
    published[indices[0], indices[1]] = True
    topology = mesh.topology
    hubs = len(mesh.joint_names)
    assert topology.columns.numel() == neighbours
    assert torch.equal(topology.mask()[hubs:, hubs:], published)
    assert len(mesh.levels[-1].edges) == (neighbours - size) // 2
    for finer, coarser in zip(mesh.levels, mesh.levels[1:], strict=False):
        assert len(np.unique(coarser.kept)) == coarser.num_vertices and coarser.kept.max() < finer.num_vertices


def test_published_joints(data) -> None:
    body = load_mesh("smpl", data=data)
    assert body.vertices is None and body.faces.shape == (13776, 3)
    assert body.joint_regressor.shape == (14, 6890) and set(body.regressors) == {"h36m"}
    h36m = np.load(data / "J_regressor_h36m_correct.npy")
    assert np.allclose(body.joint_regressor.toarray()[2], h36m[1]) and body.joint_names[2] == "R_Hip"
    assert np.allclose(body.joint_regressor.toarray()[13], h36m[10])
    hand = load_mesh("mano", data=data)
    assert hand.vertices.shape == (778, 3) and hand.joint_regressor is None


def test_published_mesh_with_model(data, tmp_path) -> None:
    model = fake_model("smpl")
    body = load_mesh("smpl", data=data, model_file=write(tmp_path / "smpl.pkl", model))
    assert np.allclose(body.vertices, model["v_template"], atol=1e-6)
    assert np.allclose(body.levels[1].vertices, body.vertices[body.levels[1].kept])
    assert body.regressors["j24"].shape == (24, 6890)
    assert np.allclose(body.regressors["j24"].toarray()[0], model["J_regressor"].toarray()[8])  # R_Ankle
    extra = np.load(data / "J_regressor_extra.npy")
    assert np.allclose(body.regressors["j24"].toarray()[18], extra[13])  # Head
    model = fake_model("mano")
    hand = load_mesh("mano", data=data, model_file=write(tmp_path / "mano.pkl", model))
    joints = hand.joint_regressor.toarray()
    assert joints.shape == (21, 778)
    assert np.allclose(joints[1], model["J_regressor"].toarray()[13]) and hand.joint_names[1] == "Thumb_1"
    tips = [joints[hand.joint_names.index(f"{f}_4")].argmax() for f in ("Thumb", "Index", "Middle", "Ring", "Pinky")]
    assert tips == [745, 317, 445, 556, 673]


def test_absent_data(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mesh_downsampling\.npz: data= .*must be the folder of data files"):
        load_mesh("smpl", data=tmp_path)
    with pytest.raises(TypeError):
        load_mesh("smpl", data=tmp_path, nonsense=1)
