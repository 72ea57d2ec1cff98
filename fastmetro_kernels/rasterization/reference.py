"""The rasteriser in plain PyTorch: the specification of the op.

Vertices are snapped to 1/256 pixel and coverage is decided in int64, so that it is exact: triangles that share an
edge never both cover, nor both miss, a pixel. The list of all (triangle, pixel of its bounding box) pairs is worked
off in pieces; depth (as bits, which order like the floats because depths are positive) and face index are packed in
one int64 whose minimum wins a pixel, so ties go to the lowest face index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUBPIXEL = 256
"""Steps of the fixed-point grid per pixel."""

COORDINATE_LIMIT = 2.0**21
"""Largest |x|, |y| in pixels; triangles with a vertex beyond it are dropped."""

_PAIRS_PER_PIECE = 1 << 20
_EMPTY = torch.iinfo(torch.int64).max


class _Triangles(NamedTuple):
    """Triangles that may cover something; one row each."""

    x: Tensor  # int64 [T, 3], 1/256 pixel
    y: Tensor
    z: Tensor  # float32 [T, 3]
    area: Tensor  # int64 [T], twice the signed area in 1/65536 square pixel, negative = seen counter-clockwise
    face: Tensor  # int64 [T]
    image: Tensor  # int64 [T]

    def rows(self, index: Tensor) -> _Triangles:
        return _Triangles(*(field[index] for field in self))


def rasterize_reference(
    vertices: Tensor, faces: Tensor, height: int, width: int, cull: bool, perspective_correct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rasterise float32 [B, V, 3] vertices; see ``api.rasterize`` for the meaning. Reads sizes back from the device."""
    batch = vertices.shape[0]
    triangles = _gather(vertices, faces)
    keep = triangles.area < 0 if cull else triangles.area != 0
    triangles = triangles.rows(keep.nonzero()[:, 0])
    x_min, x_count = _pixel_range(triangles.x, width)
    y_min, y_count = _pixel_range(triangles.y, height)
    ends = (x_count * y_count).cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0

    winner = torch.full((batch * height * width,), _EMPTY, dtype=torch.int64, device=vertices.device)
    for start in range(0, total, _PAIRS_PER_PIECE):
        pair = torch.arange(start, min(start + _PAIRS_PER_PIECE, total), device=vertices.device)
        row = torch.searchsorted(ends, pair, right=True)
        within = pair - (ends[row] - x_count[row] * y_count[row])
        pixel_x, pixel_y = x_min[row] + within % x_count[row], y_min[row] + within // x_count[row]
        triangle = triangles.rows(row)
        edges, covered = _edge_functions(triangle, pixel_x, pixel_y)
        depth, _ = _interpolation(triangle, edges, perspective_correct)
        packed = (depth.view(torch.int32).to(torch.int64) << 32) | triangle.face
        pixel = (triangle.image * height + pixel_y) * width + pixel_x
        winner.scatter_reduce_(0, pixel[covered], packed[covered], "amin")
    return _resolve(winner, vertices, faces, height, width, perspective_correct)


def _resolve(
    winner: Tensor, vertices: Tensor, faces: Tensor, height: int, width: int, perspective_correct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (vertices.shape[0], height, width)
    hit = (winner != _EMPTY).nonzero()[:, 0]
    face = winner[hit] & 0xFFFFFFFF
    triangle = _gather(vertices, faces).rows(hit // (height * width) * faces.shape[0] + face)
    edges, _ = _edge_functions(triangle, hit % width, hit // width % height)
    depth, weights = _interpolation(triangle, edges, perspective_correct)

    face_index = winner.new_full((winner.numel(),), -1, dtype=torch.int32)
    barycentrics = vertices.new_zeros((winner.numel(), 3))
    depths = vertices.new_full((winner.numel(),), float("inf"))
    face_index[hit], barycentrics[hit], depths[hit] = face.to(torch.int32), weights, depth
    return face_index.view(shape), barycentrics.view(*shape, 3), depths.view(shape)


def _gather(vertices: Tensor, faces: Tensor) -> _Triangles:
    """All B*F triangles; those that a bad index, a bad coordinate or a depth <= 0 rules out have zero area."""
    batch, num_vertices, _ = vertices.shape
    num_faces = faces.shape[0]
    faces = faces.to(torch.int64)
    good_face = ((faces >= 0) & (faces < num_vertices)).all(1)
    if num_vertices == 0:
        vertices = vertices.new_zeros((batch, 1, 3))
    corners = vertices[:, faces.clamp(0, max(num_vertices - 1, 0))]  # [B, F, 3 corners, 3]
    xy, z = corners[..., :2], corners[..., 2]
    good = (xy.abs() <= COORDINATE_LIMIT).all(-1) & (z > 0) & z.isfinite()
    good = good.all(-1) & good_face
    snapped = (torch.where(good[..., None, None], xy, 0.0) * SUBPIXEL).round().to(torch.int64)
    x, y = snapped[..., 0].reshape(-1, 3), snapped[..., 1].reshape(-1, 3)
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (y[:, 1] - y[:, 0]) * (x[:, 2] - x[:, 0])
    index = torch.arange(batch * num_faces, device=vertices.device)
    image = index // max(num_faces, 1)
    return _Triangles(x, y, z.reshape(-1, 3), area, index - image * num_faces, image)


def _pixel_range(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First pixel whose centre the corners' range can hold, and how many there are, inside the image."""
    half = SUBPIXEL // 2
    first = ((coordinate.amin(1) + half - 1) >> 8).clamp(min=0)
    last = ((coordinate.amax(1) - half) >> 8).clamp(max=size - 1)
    return first, (last - first + 1).clamp(min=0)


def _edge_functions(triangle: _Triangles, pixel_x: Tensor, pixel_y: Tensor) -> tuple[Tensor, Tensor]:
    """Edge functions at pixel centres, int64 [T, 3] and positive inside, and whether the centre is covered."""
    sign = triangle.area.sign()[:, None]
    x, y = triangle.x, triangle.y
    dx = sign * (x.roll(-2, 1) - x.roll(-1, 1))
    dy = sign * (y.roll(-2, 1) - y.roll(-1, 1))
    px = (pixel_x * SUBPIXEL + SUBPIXEL // 2)[:, None] - x.roll(-1, 1)
    py = (pixel_y * SUBPIXEL + SUBPIXEL // 2)[:, None] - y.roll(-1, 1)
    edges = dx * py - dy * px
    top_left = (dy < 0) | ((dy == 0) & (dx > 0))
    return edges, ((edges > 0) | ((edges == 0) & top_left)).all(1)


def _interpolation(triangle: _Triangles, edges: Tensor, perspective_correct: bool) -> tuple[Tensor, Tensor]:
    """Depth [T] and barycentrics [T, 3], float32.

    Every product is exact in float64, so contraction of a multiply-add cannot change a bit of the result; depths of
    a triangle of constant depth are exactly that depth.
    """
    z = triangle.z
    nearest, farthest = z.amin(1), z.amax(1)
    area = triangle.area.abs().to(torch.float32)[:, None]
    values = edges.to(torch.float32)
    weights = values / area
    if perspective_correct:
        terms = values.double() * (nearest[:, None] / z / area).double()
        total = terms[:, 0] + terms[:, 1] + terms[:, 2]
        depth = nearest.double() / total
        weights = torch.where(total[:, None] > 0, (terms / total[:, None]).float(), weights)
    else:
        terms = values.double() * ((z - z[:, :1]) / area).double()
        depth = z[:, 0].double() + terms[:, 1] + terms[:, 2]
    return torch.minimum(torch.maximum(depth.float(), nearest), farthest), weights
