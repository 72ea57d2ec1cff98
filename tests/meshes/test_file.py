"""Any mesh file through trimesh."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from fastmetro import load_mesh


@pytest.fixture(scope="module")
def surface() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=3)


@pytest.mark.parametrize("suffix", ["obj", "ply", "off"])
def test_formats(suffix, surface, tmp_path) -> None:
    path = tmp_path / f"ball.{suffix}"
    surface.export(path)
    mesh = load_mesh(path)
    assert mesh.name == "ball" and [level.num_vertices for level in mesh.levels] == [642, 195]
    assert np.allclose(mesh.vertices, surface.vertices, atol=1e-5) and np.array_equal(mesh.faces, surface.faces)
    assert mesh.topology.num_tokens == 6 + 195
    assert mesh.joint_names[3] == "max_y"
    assert np.allclose((mesh.joint_regressor @ mesh.vertices)[3], [0, 1, 0], atol=1e-5)


def test_triangles_of_an_stl_are_joined(surface, tmp_path) -> None:
    path = tmp_path / "ball.stl"
    surface.export(path)
    mesh = load_mesh(path)
    assert [level.num_vertices for level in mesh.levels] == [642, 195]
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_own_joints_and_sizes(surface, tmp_path) -> None:
    path = tmp_path / "ball.ply"
    surface.export(path)
    joints = np.full((2, 642), 1 / 642)
    mesh = load_mesh(str(path), sizes=(300, 100, 50), joints=joints, joint_names=("a", "b"), part="hand")
    assert [level.num_vertices for level in mesh.levels] == [642, 300, 100, 50]
    assert mesh.joint_names == ("a", "b") and mesh.part == "hand"
    with pytest.raises(ValueError, match=r"joints must be \[3, 642\]"):
        load_mesh(path, sizes=(50,), joints=joints, joint_names=("a", "b", "c"))
    with pytest.raises(ValueError, match="must sum to 1"):
        load_mesh(path, sizes=(50,), joints=2 * joints)
    with pytest.raises(ValueError, match="part must be"):
        load_mesh(path, part="foot")


def test_no_triangles(tmp_path) -> None:
    path = tmp_path / "points.ply"
    trimesh.PointCloud(np.random.default_rng(0).normal(size=(50, 3))).export(path)
    with pytest.raises(ValueError, match="no single triangle mesh"):
        load_mesh(path)
