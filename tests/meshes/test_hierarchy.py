"""Quadric edge collapse and barycentric upsampling."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from fastmetro import load_mesh
from fastmetro.meshes.hierarchy import build_hierarchy, closest_on_triangles
from fastmetro.meshes.simplification import simplify


def sphere() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=3)


def torus() -> trimesh.Trimesh:
    return trimesh.creation.torus(1.0, 0.35)


@pytest.mark.parametrize(("make", "target"), [(sphere, 60), (sphere, 12), (torus, 80)])
def test_subset_placement_and_topology(make, target) -> None:
    mesh = make()
    kept, faces = simplify(mesh.vertices, mesh.faces, target)
    assert len(kept) == target and np.all(np.diff(kept) > 0)
    coarse = trimesh.Trimesh(mesh.vertices[kept], faces, process=False)
    assert coarse.is_watertight and coarse.is_winding_consistent
    assert coarse.euler_number == mesh.euler_number
    assert 0.4 * mesh.volume < coarse.volume < 1.02 * mesh.volume


def test_deterministic() -> None:
    mesh = sphere()
    first, second = (simplify(mesh.vertices, mesh.faces, 50) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_flat_regions_go_first() -> None:
    """A finely divided cube keeps its corners, where the quadric error is."""
    box = trimesh.creation.box().subdivide().subdivide().subdivide()
    kept, _ = simplify(box.vertices, box.faces, 30)
    corners = (np.abs(np.abs(box.vertices[kept]) - 0.5) < 1e-9).all(1)
    assert corners.sum() == 8


def test_importance_moves_vertices() -> None:
    mesh = sphere()
    upper = mesh.vertices[:, 2] > 0
    kept, _ = simplify(mesh.vertices, mesh.faces, 80, np.where(upper, 30.0, 1.0))
    assert upper[kept].mean() > 0.65


def test_open_boundary_stays() -> None:
    mesh = sphere()
    faces = mesh.faces[(mesh.triangles_center[:, 2] < 0.2)]
    used = np.unique(faces)
    points, faces = mesh.vertices[used], np.searchsorted(used, faces)
    kept, coarse = simplify(points, faces, 40)
    result = trimesh.Trimesh(points[kept], coarse, process=False)
    assert result.euler_number == 1 and not result.is_watertight
    rim = np.unique(trimesh.Trimesh(points, faces, process=False).outline().vertices[:, 2].round(6))
    assert np.ptp(result.outline().vertices[:, 2]) <= np.ptp(rim) + 1e-9


def test_upsampling_rows() -> None:
    mesh = torus()
    levels, upsampling = build_hierarchy(mesh.vertices, mesh.faces, (200, 60))
    assert [level.num_vertices for level in levels] == [len(mesh.vertices), 200, 60]
    assert [matrix.shape for matrix in upsampling] == [(200, 60), (len(mesh.vertices), 200)]
    for matrix, level in zip(upsampling, reversed(levels[1:]), strict=True):
        assert np.diff(matrix.indptr).max() <= 3 and np.diff(matrix.indptr).min() >= 1
        assert matrix.data.min() >= 0 and np.abs(matrix.sum(1) - 1).max() < 1e-6
        assert np.array_equal(matrix[level.kept].toarray(), np.eye(level.num_vertices))
    rebuilt = upsampling[1] @ (upsampling[0] @ levels[-1].vertices)
    assert np.linalg.norm(rebuilt - levels[0].vertices, axis=1).max() < 0.25


def test_closest_point_against_sampling() -> None:
    generator = np.random.default_rng(0)
    points, triangles = generator.normal(size=(200, 3)), generator.normal(size=(200, 3, 3))
    barycentrics, distances = closest_on_triangles(points, triangles)
    assert barycentrics.min() >= 0 and np.allclose(barycentrics.sum(-1), 1)
    assert np.allclose(((np.einsum("nc,ncd->nd", barycentrics, triangles) - points) ** 2).sum(-1), distances)
    grid = generator.dirichlet(np.full(3, 0.5), 3000)
    sampled = ((np.einsum("sc,ncd->nsd", grid, triangles) - points[:, None]) ** 2).sum(-1).min(1)
    assert np.all(distances <= sampled + 1e-12) and np.allclose(distances, sampled, atol=0.05)


def test_errors() -> None:
    mesh = sphere()
    with pytest.raises(ValueError, match="sizes must descend"):
        build_hierarchy(mesh.vertices, mesh.faces, (60, 60))
    with pytest.raises(ValueError, match=r"faces must index 642 vertices"):
        simplify(mesh.vertices, mesh.faces + 1, 60)
    with pytest.raises(TypeError, match="integers"):
        simplify(mesh.vertices, mesh.faces.astype(float), 60)
    with pytest.raises(ValueError, match="finite"):
        simplify(mesh.vertices * np.nan, mesh.faces, 60)
    with pytest.raises(ValueError, match="belongs to 3 triangles"):
        simplify(mesh.vertices, np.concatenate([mesh.faces, [[*mesh.faces[0, :2], mesh.faces[-1, 2]]]]), 60)
    with pytest.raises(ValueError, match="cannot be reached"):
        simplify(torus().vertices, torus().faces, 5)


@pytest.mark.parametrize(("name", "sizes"), [("anny-body", (13348, 1723, 431)), ("anny-hand", (1609, 195))])
def test_anny_levels(name, sizes) -> None:
    mesh = load_mesh(name)
    assert tuple(level.num_vertices for level in mesh.levels) == sizes
    for level in mesh.levels:
        surface = trimesh.Trimesh(level.vertices, level.faces, process=False)
        assert surface.is_winding_consistent and surface.euler_number == (2 if mesh.part == "body" else 1)
        assert surface.is_watertight == (mesh.part == "body")
        assert np.array_equal(np.unique(np.sort(surface.edges, 1), axis=0), level.edges)
    for finer, coarser in zip(mesh.levels, mesh.levels[1:], strict=False):
        assert np.array_equal(finer.vertices[coarser.kept], coarser.vertices)
    rebuilt = mesh.levels[-1].vertices
    for matrix in mesh.upsampling:
        assert np.abs(matrix.sum(1) - 1).max() < 1e-6 and np.diff(matrix.indptr).max() <= 3
        rebuilt = matrix @ rebuilt
    error = np.linalg.norm(rebuilt - mesh.vertices, axis=1)
    assert error.mean() < (5.5e-3 if mesh.part == "body" else 1e-3) and error.max() < 0.03


def test_anny_topology() -> None:
    topology = load_mesh("anny-body").topology
    assert (topology.num_hubs, topology.num_vertices) == (14, 431)
    assert topology.columns.numel() == 431 + 2 * 1287  # a closed surface of genus 0, with self loops
