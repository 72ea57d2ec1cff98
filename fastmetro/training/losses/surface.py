"""Edges and normals of one level of a mesh, compared with the truth."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmetro.meshes.mesh import MeshLevel
from fastmetro.training.losses.terms import known, l1_sum
from fastmetro_kernels import SparseMatrix, sparse_upsample

_PUBLISHED_EPSILON = 1e-8  # square metres, inside the root of an edge's length: 0.1 mm
_SMALLEST = 1e-12  # metres; shorter edges and normals are not scaled to length 1 (as in F.normalize)


class SurfaceTerms(nn.Module):
    """Sums of the errors of edge lengths and normals.

    Edge vectors are products with a sparse matrix, whose gradient is gathered in a fixed order. The normals of the
    faces at an edge are gathered too, so that no gradient is ever scattered.

    Args:
        level: the level of the mesh.
        normals: whether normals are wanted.
        published: lengths are sqrt(squares + 1e-8), and the term ``edge_self`` is their plain mean (protocol 3.7).
        per_face: count an edge once for each of its faces, as the released code does for hands.

    Attributes:
        sizes: what one sample adds to the denominators of the terms, by name.

    Raises:
        ValueError: the level has no edges, or faces are needed that it has not.
    """

    faces_of_edge: Tensor | None
    is_face: Tensor | None
    edges_of_face: Tensor | None
    edge_counts: Tensor | None

    def __init__(self, level: MeshLevel, normals: bool, published: bool = False, per_face: bool = False) -> None:
        super().__init__()
        self.published = published
        count = len(level.edges)
        if count == 0:
            raise ValueError("edge lengths and normals need a level with edges, got one with none")
        ends, signs = np.repeat(np.arange(count), 2), np.tile([-1.0, 1.0], count)
        self.incidence = SparseMatrix(sp.csr_matrix((signs, (ends, level.edges.ravel())), (count, level.num_vertices)))
        self.sizes = {"edge_lengths": count, "edge_self": count}
        for name in ("faces_of_edge", "is_face", "edges_of_face", "edge_counts"):
            self.register_buffer(name, None, persistent=False)
        if not (normals or per_face):
            return
        if level.faces is None:
            raise ValueError("normals need a level with faces, got one with edges only")
        corners = _edges_of_faces(level)
        if normals:
            table = _faces_of_edges(corners, count)
            self.faces_of_edge = torch.from_numpy(np.maximum(table, 0)).flatten()
            self.is_face = torch.from_numpy(table >= 0).unsqueeze(-1)
            self.edges_of_face = torch.from_numpy(corners)
            self.sizes["normals"] = corners.size
        if per_face:
            self.edge_counts = torch.from_numpy(np.bincount(corners.ravel(), minlength=count)).float()
            self.sizes["edge_lengths"] = corners.size

    def forward(self, prediction: Tensor, truth: Tensor, valid: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Sums of those of the terms ``names`` that are its own, over the samples where ``valid`` [B] holds.

        Vertices of the level are [B, n, 3], metres; those of the truth may hold NaN where they do not count.
        """
        edges = sparse_upsample(prediction, self.incidence)
        plain = torch.linalg.vector_norm(edges, dim=-1)
        lengths = self._lengths(plain)
        true_edges = sparse_upsample(truth, self.incidence)
        sums: dict[str, Tensor] = {}
        if "edge_lengths" in names:
            goal = self._lengths(torch.linalg.vector_norm(true_edges, dim=-1))
            if self.edge_counts is None:
                sums["edge_lengths"] = l1_sum(lengths, goal, valid)
            else:
                sums["edge_lengths"] = ((lengths - known(goal, valid, lengths)).abs() * self.edge_counts).sum()
        if "edge_self" in names:
            spread = lengths if self.published else (lengths - lengths.mean(dim=1, keepdim=True)).abs()
            sums["edge_self"] = (spread * valid.unsqueeze(1)).sum()
        if "normals" in names:
            normals = self._normals_at_edges(true_edges, valid)
            cosines = (edges.unsqueeze(2) * normals).sum(dim=-1).abs().sum(dim=-1)
            sums["normals"] = (cosines / plain.clamp_min(_SMALLEST)).sum()
        return sums

    def _lengths(self, plain: Tensor) -> Tensor:
        return (plain.square() + _PUBLISHED_EPSILON).sqrt() if self.published else plain

    @torch.no_grad()
    def _normals_at_edges(self, edges: Tensor, valid: Tensor) -> Tensor:
        """Unit normals [B, E, K, 3] of the faces at each edge, up to sign; 0 where there is none or no label."""
        assert self.edges_of_face is not None and self.faces_of_edge is not None and self.is_face is not None
        first, second, _ = self.edges_of_face.unbind(1)
        normals = F.normalize(torch.linalg.cross(edges[:, first], edges[:, second]), dim=-1, eps=_SMALLEST)
        spread = normals[:, self.faces_of_edge].unflatten(1, self.is_face.shape[:2])
        return torch.where(valid.view(-1, 1, 1, 1) & self.is_face, spread, 0.0)


def _edges_of_faces(level: MeshLevel) -> NDArray[np.int64]:
    """The numbers of the three edges of each face, [F, 3]."""
    assert level.faces is not None
    size = level.num_vertices
    sides = np.sort(level.faces[:, [[0, 1], [0, 2], [1, 2]]], axis=-1)
    codes = np.sort(level.edges, axis=1) @ [size, 1]
    order = np.argsort(codes)
    wanted = sides @ [size, 1]
    place = np.searchsorted(codes, wanted, sorter=order).clip(max=len(codes) - 1)
    found = order[place]
    if not np.array_equal(codes[found], wanted):
        raise ValueError("normals need a level whose edges are those of its faces, got faces with other edges")
    return found


def _faces_of_edges(edges_of_face: NDArray[np.int64], num_edges: int) -> NDArray[np.int64]:
    """The faces at each edge, [E, K], filled up with -1."""
    edge, face = edges_of_face.ravel(), np.repeat(np.arange(len(edges_of_face)), 3)
    order = np.argsort(edge, kind="stable")
    edge, face = edge[order], face[order]
    count = np.bincount(edge, minlength=num_edges)
    rank = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((num_edges, max(int(count.max()), 1)), -1)
    table[edge, rank] = face
    return table
