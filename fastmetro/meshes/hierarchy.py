"""Mesh hierarchies: fine to coarse by quadric edge collapse, coarse to fine by sparse barycentric matrices.

The scheme is CoMA's (Ranjan et al., "Generating 3D faces using convolutional mesh autoencoders", ECCV 2018, section
3.2), which the published SMPL and MANO hierarchies of FastMETRO follow too: kept vertices stay where they are, removed
ones are projected onto the nearest triangle of the coarse surface and written as barycentric combinations of its
corners.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from fastmetro.meshes.mesh import MeshLevel
from fastmetro.meshes.simplification import check_mesh, half_edges, simplify

CANDIDATES = 48  # coarse triangles considered for a removed vertex, by the distance of their centroids


def build_hierarchy(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    sizes: Sequence[int],
    importance: NDArray[np.floating] | None = None,
) -> tuple[tuple[MeshLevel, ...], tuple[sp.csr_matrix, ...]]:
    """Simplify a triangle mesh step by step.

    Args:
        vertices: [M, 3] in a pose in which parts do not touch, metres.
        faces: [F, 3] triangles of a surface whose edges have at most two.
        sizes: numbers of vertices of the coarser levels, descending, e.g. `(1723, 431)`.
        importance: [M] positive weights of the error at each vertex, to keep more vertices there; 1 by default.

    Returns:
        levels, fine to coarse, the first being the mesh itself, and the upsampling matrices, coarse to fine:
        `upsampling[0]` is [sizes[-2], sizes[-1]], the last one [M, sizes[0]]. Rows have at most three entries, all
        in [0, 1], and sum to 1.

    Raises:
        TypeError: faces that are not integers.
        ValueError: no surface (see `simplify`), sizes that do not descend, or one that cannot be reached.
    """
    points, triangles = check_mesh(vertices, faces)
    steps = [len(points), *map(int, sizes)]
    if any(a <= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"sizes must descend from {len(points)} vertices, got {tuple(sizes)}")
    weights = None if importance is None else np.asarray(importance, np.float64)
    levels = [mesh_level(points, triangles, np.arange(len(points)))]
    matrices: list[sp.csr_matrix] = []
    for size in steps[1:]:
        kept, coarse = simplify(points, triangles, size, weights)
        matrices.append(upsampling_matrix(points, triangles, kept, coarse))
        points, triangles = points[kept], coarse
        weights = None if weights is None else weights[kept]
        levels.append(mesh_level(points, triangles, kept))
    return tuple(levels), tuple(reversed(matrices))


def mesh_level(points: NDArray[np.floating], faces: NDArray[np.int64], kept: NDArray[np.int64]) -> MeshLevel:
    """A level with the edges of its faces."""
    return MeshLevel(points.astype(np.float32), faces.astype(np.int64), face_edges(faces), kept.astype(np.int64))


def face_edges(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """The undirected edges of triangles, sorted, each once with the smaller vertex first, int64 [e, 2]."""
    return np.unique(np.sort(half_edges(faces.astype(np.int64)), 1), axis=0)


def upsampling_matrix(
    fine: NDArray[np.floating], faces: NDArray[np.int64], kept: NDArray[np.int64], coarse_faces: NDArray[np.int64]
) -> sp.csr_matrix:
    """The matrix [n, len(kept)] that places every fine vertex on the coarse surface.

    Removed vertices go to the nearest point of the triangles whose normals are within 90 degrees of their own (so that
    a fingertip does not land on its neighbour finger), or of all triangles where none is. Kept vertices stay.

    Args:
        fine, faces: [n, 3] and [f, 3], the finer mesh.
        kept: [m] ascending indices of the coarse vertices among the fine ones.
        coarse_faces: [g, 3], numbering `kept`.
    """
    points = np.asarray(fine, np.float64)
    coarse = points[kept]
    removed = np.setdiff1d(np.arange(len(points)), kept)
    corners = coarse[coarse_faces]
    _, near = cKDTree(corners.mean(1)).query(points[removed], k=min(CANDIDATES, len(coarse_faces)))
    near = near.reshape(len(removed), -1)
    barycentrics, distances = closest_on_triangles(points[removed][:, None], corners[near])
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = (normals[near] * vertex_normals(points, faces)[removed][:, None]).sum(-1) > 0
    distances = np.where(facing, distances, distances + np.ptp(points, 0).sum() ** 2)
    rows = np.arange(len(removed))
    best = distances.argmin(1)
    weights = barycentrics[rows, best]
    weights[weights < 1e-6] = 0.0
    weights /= weights.sum(1, keepdims=True)

    row = np.concatenate([kept, np.repeat(removed, 3)])
    column = np.concatenate([np.arange(len(kept)), coarse_faces[near[rows, best]].ravel()])
    value = np.concatenate([np.ones(len(kept)), weights.ravel()])
    matrix = sp.csr_matrix((value, (row, column)), shape=(len(points), len(kept)))
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix.astype(np.float32)


def vertex_normals(points: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    """Area-weighted normals, [n, 3], not normalised."""
    corners = points[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    result = np.zeros_like(points)
    for corner in range(3):
        np.add.at(result, faces[:, corner], normals)
    return result


def closest_on_triangles(
    points: NDArray[np.float64], triangles: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Barycentric coordinates of the points of triangles nearest to given points, and the squared distances.

    Args:
        points: [..., 3].
        triangles: [..., 3, 3] corners, broadcast against the points.

    Returns:
        [..., 3] in [0, 1] with sum 1, and [...].
    """
    a, b, c = triangles[..., 0, :], triangles[..., 1, :], triangles[..., 2, :]
    tiny = np.finfo(np.float64).tiny
    u, v, w = b - a, c - a, points - a
    uu, uv, vv = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    wu, wv = (w * u).sum(-1), (w * v).sum(-1)
    det = np.maximum(uu * vv - uv * uv, tiny)
    s, t = (vv * wu - uv * wv) / det, (uu * wv - uv * wu) / det
    options = [np.stack([1 - s - t, s, t], -1)]  # the foot of the perpendicular, then the nearest point of each side
    for first, second in ((0, 1), (1, 2), (2, 0)):
        start, side = triangles[..., first, :], triangles[..., second, :] - triangles[..., first, :]
        along = ((points - start) * side).sum(-1) / np.maximum((side * side).sum(-1), tiny)
        along = np.clip(along, 0.0, 1.0)
        option = np.zeros((*along.shape, 3))
        option[..., first], option[..., second] = 1 - along, along
        options.append(option)
    inside = (options[0] >= 0).all(-1)
    stacked = np.stack(options, -2)  # [..., 4, 3]
    offsets = np.einsum("...kc,...cd->...kd", stacked, triangles) - points[..., None, :]
    distances = (offsets**2).sum(-1)
    distances[..., 0] = np.where(inside, distances[..., 0], np.inf)
    best = distances.argmin(-1)[..., None]
    chosen = np.take_along_axis(stacked, best[..., None], -2)[..., 0, :]
    return chosen, np.take_along_axis(distances, best, -1)[..., 0]
