"""Quadric edge collapse onto a subset of the vertices.

Edges are collapsed in the order of the quadric error (Garland and Heckbert, "Surface simplification using quadric error
metrics", 1997). As in CoMA (Ranjan et al., ECCV 2018, section 3.2) a collapse keeps one of the edge's two vertices
where it is, so that the coarse vertices are a subset of the fine ones. A collapse is refused if it would change the
topology of the surface (link condition) or fold it over.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

Quadric = tuple[float, ...]  # upper triangle of the symmetric 4x4 matrix, row by row
Point = tuple[float, float, float]

SPACING = 3e-3  # weight of the distance to the removed vertices themselves against the distance to their planes
BOUNDARY = 10.0  # weight of the planes through open boundaries, perpendicular to the surface
MIN_COSINE = 0.2  # between a triangle's normals before and after a collapse
MIN_QUALITY = 0.12  # 4 sqrt(3) area / sum of squared sides, 1 for equilateral triangles
RELAXED = ((MIN_COSINE, MIN_QUALITY), (0.05, 0.03), (0.0, 1e-4))  # tried in turn until the target is reached


def simplify(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    target: int,
    importance: NDArray[np.floating] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Collapse edges until `target` vertices are left.

    Args:
        vertices: [n, 3], any unit.
        faces: [f, 3] triangles; every vertex in at least one, every edge in at most two.
        target: vertices to keep.
        importance: [n] positive weights of the error at each vertex; 1 by default.

    Returns:
        kept, int64 [target], ascending indices into `vertices`; faces of the coarse mesh, int64 [g, 3], numbering them.

    Raises:
        ValueError: shapes or indices that do not fit, an edge of more than two triangles, a vertex without triangles,
            or a target that cannot be reached without changing the topology of the surface.
    """
    mesh = _Collapser(vertices, faces, importance)
    if not 4 <= target <= len(vertices):
        raise ValueError(f"target must be 4 to {len(vertices)} (the number of vertices), got {target}")
    for cosine, quality in RELAXED:
        if mesh.run(target, cosine, quality):
            return mesh.result()
    raise ValueError(
        f"target={target} cannot be reached without changing the topology of the surface: {mesh.alive} are left"
    )


def _sub(a: Point, b: Point) -> Point:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _dot(a: Point, b: Point) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Point, b: Point) -> Point:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _error(q: Quadric, p: Point) -> float:
    x, y, z = p
    return (
        (q[0] * x + 2 * (q[1] * y + q[2] * z + q[3])) * x
        + (q[4] * y + 2 * (q[5] * z + q[6])) * y
        + (q[7] * z + 2 * q[8]) * z
        + q[9]
    )


class _Collapser:
    """The state of one simplification: positions, live triangles, quadrics and a heap of directed collapses."""

    def __init__(
        self, vertices: NDArray[np.floating], faces: NDArray[np.integer], importance: NDArray[np.floating] | None
    ) -> None:
        points, triangles = check_mesh(vertices, faces)
        count = len(points)
        if importance is not None and (np.shape(importance) != (count,) or not np.all(np.asarray(importance) > 0)):
            raise ValueError(f"importance must be [{count}] positive numbers, got shape {np.shape(importance)}")
        centred = points - points.mean(0)  # quadrics lose digits far from the origin
        self.points: list[Point] = [(x, y, z) for x, y, z in centred.tolist()]
        self.faces: list[tuple[int, int, int] | None] = [(a, b, c) for a, b, c in triangles.tolist()]
        self.around: list[set[int]] = [set() for _ in range(count)]
        for number, face in enumerate(triangles.tolist()):
            for vertex in face:
                self.around[vertex].add(number)
        if not all(self.around):
            raise ValueError(f"vertex {next(i for i, f in enumerate(self.around) if not f)} belongs to no triangle")
        quadrics = vertex_quadrics(centred, triangles)
        if importance is not None:
            quadrics *= np.asarray(importance, np.float64)[:, None]
        self.quadrics: list[Quadric] = [tuple(q) for q in quadrics.tolist()]
        self.version = [0] * count
        self.alive = count

    def neighbours(self, vertex: int) -> set[int]:
        found: set[int] = set()
        for number in self.around[vertex]:
            found.update(self.faces[number] or ())
        found.discard(vertex)
        return found

    def run(self, target: int, cosine: float, quality: float) -> bool:
        """Collapse until `target` vertices are left; False if no allowed collapse is left before that."""
        while self.alive > target:
            heap: list[tuple[float, int, int, int, int]] = []
            for vertex, faces in enumerate(self.around):
                if faces:
                    for other in self.neighbours(vertex):
                        self.push(heap, vertex, other)
            heapq.heapify(heap)
            before = self.alive
            while heap and self.alive > target:
                _, removed, kept, removed_version, kept_version = heapq.heappop(heap)
                stale = self.version[removed] != removed_version or self.version[kept] != kept_version
                if stale or not self.allowed(removed, kept, cosine, quality):
                    continue
                self.collapse(removed, kept)
                for other in self.neighbours(kept):
                    for pair in ((kept, other), (other, kept)):
                        heapq.heappush(heap, self.entry(*pair))
            if self.alive == before:
                return False
        return True

    def entry(self, removed: int, kept: int) -> tuple[float, int, int, int, int]:
        cost = _error(self.quadrics[removed], self.points[kept]) + _error(self.quadrics[kept], self.points[kept])
        return cost, removed, kept, self.version[removed], self.version[kept]

    def push(self, heap: list[tuple[float, int, int, int, int]], removed: int, kept: int) -> None:
        heap.append(self.entry(removed, kept))

    def allowed(self, removed: int, kept: int, cosine: float, quality: float) -> bool:
        shared = self.around[removed] & self.around[kept]
        common = self.neighbours(removed) & self.neighbours(kept)
        if not shared or len(common) != len(shared) or len(self.around[removed]) + len(self.around[kept]) <= 6:
            return False  # the link condition: else the surface would be pinched or a handle closed
        if len(shared) == 2 and self.on_boundary(removed):
            return False  # a boundary vertex moves along the boundary only
        for number in self.around[removed] - shared:
            if not self.stays_upright(number, removed, kept, cosine, quality):
                return False
        return True

    def on_boundary(self, vertex: int) -> bool:
        return len(self.neighbours(vertex)) != len(self.around[vertex])

    def stays_upright(self, number: int, removed: int, kept: int, cosine: float, quality: float) -> bool:
        face = self.faces[number]
        assert face is not None
        start = face.index(removed)
        a, b = self.points[face[(start + 1) % 3]], self.points[face[(start + 2) % 3]]
        side = _sub(b, a)
        old, new = _sub(self.points[removed], a), _sub(self.points[kept], a)
        normal, moved = _cross(side, old), _cross(side, new)
        area, moved_area = math.sqrt(_dot(normal, normal)), math.sqrt(_dot(moved, moved))
        last = _sub(self.points[kept], b)
        sides = _dot(side, side) + _dot(new, new) + _dot(last, last)
        if 2 * math.sqrt(3) * moved_area <= quality * sides:
            return False
        return _dot(normal, moved) > cosine * area * moved_area

    def collapse(self, removed: int, kept: int) -> None:
        for number in list(self.around[removed]):
            face = self.faces[number]
            assert face is not None
            if kept in face:
                for vertex in face:
                    self.around[vertex].discard(number)
                self.faces[number] = None
            else:
                a, b, c = (kept if vertex == removed else vertex for vertex in face)
                self.faces[number] = (a, b, c)
                self.around[kept].add(number)
        self.around[removed].clear()
        self.quadrics[kept] = tuple(x + y for x, y in zip(self.quadrics[kept], self.quadrics[removed], strict=True))
        self.version[removed] += 1
        self.version[kept] += 1
        self.alive -= 1

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        kept = np.array([i for i, faces in enumerate(self.around) if faces], np.int64)
        faces = np.array([face for face in self.faces if face is not None], np.int64).reshape(-1, 3)
        return kept, np.searchsorted(kept, faces)


def check_mesh(
    vertices: NDArray[np.floating], faces: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices as float64 [n, 3] and faces as int64 [f, 3] of a surface whose edges have one or two triangles.

    Raises:
        TypeError: faces that are not integers.
        ValueError: other shapes, values that are not finite, indices out of range, an edge of three or more triangles.
    """
    points = np.asarray(vertices, np.float64)
    triangles = np.asarray(faces)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"vertices must be [n, 3] with n > 0, got shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("vertices must be finite, got NaN or infinite values")
    if not np.issubdtype(triangles.dtype, np.integer):
        raise TypeError(f"faces must be integers, got {triangles.dtype}")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or len(triangles) == 0:
        raise ValueError(f"faces must be [f, 3] triangles with f > 0, got shape {triangles.shape}")
    triangles = triangles.astype(np.int64)
    if triangles.min() < 0 or triangles.max() >= len(points):
        raise ValueError(f"faces must index {len(points)} vertices, got {triangles.min()} to {triangles.max()}")
    edges, counts = np.unique(np.sort(half_edges(triangles), 1), axis=0, return_counts=True)
    if counts.max() > 2:
        raise ValueError(
            f"edge {tuple(edges[counts.argmax()].tolist())} belongs to {counts.max()} triangles; at most 2"
        )
    return points, triangles


def half_edges(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """The three directed edges of every triangle, [3 f, 2]."""
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def vertex_quadrics(points: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    """Error quadrics [n, 10]: area-weighted planes of the triangles, walls at open boundaries, the point itself."""
    corners = points[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(normals, axis=1) / 2
    units = normals / np.maximum(2 * areas, np.finfo(np.float64).tiny)[:, None]
    planes = np.concatenate([units, -(units * corners[:, 0]).sum(1, keepdims=True)], 1)
    result = np.zeros((len(points), 10))
    _add_planes(result, faces, planes, areas / 3)

    edges = half_edges(faces)
    _, inverse, counts = np.unique(np.sort(edges, 1), axis=0, return_inverse=True, return_counts=True)
    open_edges = np.flatnonzero(counts[inverse.reshape(-1)] == 1)
    if len(open_edges):
        ends = edges[open_edges]
        side = points[ends[:, 1]] - points[ends[:, 0]]
        walls = np.cross(side, units[open_edges % len(faces)])
        walls /= np.maximum(np.linalg.norm(walls, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        planes = np.concatenate([walls, -(walls * points[ends[:, 0]]).sum(1, keepdims=True)], 1)
        _add_planes(result, ends, planes, BOUNDARY * (side**2).sum(1) / 2)

    share = SPACING * np.bincount(faces.ravel(), np.repeat(areas / 3, 3), len(points))
    eye = np.array([1.0, 0, 0, 0, 1.0, 0, 0, 1.0, 0, 0])
    result += share[:, None] * eye
    result[:, [3, 6, 8]] -= share[:, None] * points
    result[:, 9] += share * (points**2).sum(1)
    return result


def _add_planes(
    quadrics: NDArray[np.float64], owners: NDArray[np.int64], planes: NDArray[np.float64], weights: NDArray[np.float64]
) -> None:
    rows, columns = np.triu_indices(4)
    values = weights[:, None] * planes[:, rows] * planes[:, columns]
    for corner in range(owners.shape[1]):
        np.add.at(quadrics, owners[:, corner], values)
