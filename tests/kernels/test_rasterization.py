"""The rasteriser: exact coverage, the same bits on every backend, and what the outputs mean."""

from __future__ import annotations

import math

import pytest
import torch
from raster_cases import BACKENDS, assert_same, random_scene, run, tensor
from torch import Tensor

from fastmetro_kernels import RasterOutput, interpolate, rasterize


def sphere(level: int) -> tuple[Tensor, Tensor]:
    """A unit sphere by subdivision of an octahedron (faces counter-clockwise seen from outside, y up, z to us)."""
    vertices = [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (-1.0, 0, 0), (0, -1.0, 0), (0, 0, -1.0)]
    faces = [(0, 1, 2), (1, 3, 2), (3, 4, 2), (4, 0, 2), (1, 0, 5), (3, 1, 5), (4, 3, 5), (0, 4, 5)]
    for _ in range(level):
        middle: dict[tuple[int, int], int] = {}
        finer = []
        for a, b, c in faces:
            new = []
            for i, j in ((a, b), (b, c), (c, a)):
                key = (min(i, j), max(i, j))
                if key not in middle:
                    point = [(p + q) / 2 for p, q in zip(vertices[i], vertices[j], strict=True)]
                    norm = math.sqrt(sum(p * p for p in point))
                    middle[key] = len(vertices)
                    vertices.append(tuple(p / norm for p in point))
                new.append(middle[key])
            finer += [(a, new[0], new[2]), (new[0], b, new[1]), (new[2], new[1], c), tuple(new)]
        faces = finer
    return torch.tensor(vertices), torch.tensor(faces)


def brute_force(vertices: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """Face indices of one image by Python integers: an independent statement of the coverage rule."""
    result = torch.full((height, width), -1, dtype=torch.int32)
    nearest = torch.full((height, width), math.inf, dtype=torch.float64)
    for face, corners in enumerate(faces.tolist()):
        points = vertices[corners].tolist()
        if any(point[2] <= 0 for point in points):
            continue
        grid = [(round(x * 256), round(y * 256), z) for x, y, z in points]
        (ax, ay, _), (bx, by, _), (cx, cy, _) = grid
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0:
            continue
        if area < 0:
            grid = [grid[0], grid[2], grid[1]]
        for row in range(height):
            for column in range(width):
                x, y, weights = column * 256 + 128, row * 256 + 128, []
                for i in range(3):
                    (px, py, _), (qx, qy, _) = grid[(i + 1) % 3], grid[(i + 2) % 3]
                    value = (qx - px) * (y - py) - (qy - py) * (x - px)
                    left_or_top = qy < py or (qy == py and qx > px)
                    weights.append(value if value > 0 or (value == 0 and left_or_top) else -1)
                if min(weights) >= 0:
                    depth = sum(w * point[2] for w, point in zip(weights, grid, strict=True)) / abs(area)
                    if depth < nearest[row, column] - 1e-6:
                        nearest[row, column], result[row, column] = depth, face
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_brute_force(backend: str, device: torch.device) -> None:
    vertices, faces = random_scene(3, "cpu", batch=1, triangles=25, size=(19, 23), extent=16)
    actual = run(vertices.to(device), faces.to(device), 19, 23, backend)
    assert torch.equal(actual.face_index[0].cpu(), brute_force(vertices[0], faces, 19, 23))


@pytest.mark.parametrize("perspective_correct", [False, True])
@pytest.mark.parametrize("cull", [False, True])
@pytest.mark.parametrize(
    ("size", "triangles", "extent"),
    [
        ((37, 53), 60, 20.0),
        ((1, 1), 40, 4.0),
        ((1, 211), 50, 60.0),
        ((97, 3), 50, 60.0),
        ((160, 170), 12, 400.0),
        ((64, 64), 1000, 3.0),
    ],
)
def test_native_equals_reference_bit_for_bit(
    size: tuple[int, int], triangles: int, extent: float, cull: bool, perspective_correct: bool, device: str
) -> None:
    for seed in range(2):
        vertices, faces = random_scene(seed, device, batch=seed + 1, triangles=triangles, size=size, extent=extent)
        options = {"cull": cull, "perspective_correct": perspective_correct}
        expected = run(vertices, faces, *size, "reference", **options)
        assert size == (1, 1) or (expected.face_index >= 0).any()
        assert_same(run(vertices, faces, *size, "native", **options), expected)


def test_every_device_gives_the_same_bits(device: torch.device) -> None:
    for perspective_correct in (False, True):
        vertices, faces = random_scene(11, "cpu", batch=3, triangles=300, size=(90, 110), extent=50)
        expected = rasterize(vertices, faces, 90, 110, perspective_correct=perspective_correct, backend="reference")
        actual = run(vertices.to(device), faces.to(device), 90, 110, "native", perspective_correct=perspective_correct)
        assert_same(RasterOutput(*(field.cpu() for field in actual)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meaning_of_the_outputs(backend: str, device: torch.device) -> None:
    vertices, faces = random_scene(5, device, batch=2, triangles=80)
    out = run(vertices, faces, 37, 53, backend)
    assert out.face_index.dtype == torch.int32 and out.face_index.shape == (2, 37, 53)
    assert out.barycentrics.dtype == torch.float32 and out.barycentrics.shape == (2, 37, 53, 3)
    assert out.depth.dtype == torch.float32 and out.depth.shape == (2, 37, 53)
    background = out.face_index < 0
    assert background.any() and (~background).any()
    assert torch.isinf(out.depth[background]).all() and (out.barycentrics[background] == 0).all()
    assert (out.barycentrics >= 0).all()
    torch.testing.assert_close(
        out.barycentrics[~background].sum(-1), torch.ones_like(out.depth[~background]), atol=3e-7, rtol=0
    )
    position = interpolate(vertices, faces, out)
    y, x = torch.meshgrid(torch.arange(37, device=device), torch.arange(53, device=device), indexing="ij")
    centres = torch.stack([x, y], -1).expand(2, -1, -1, -1) + 0.5
    difference = (position[..., :2] - centres)[~background]
    assert difference.abs().max() <= 1 / 256  # half a step of the grid in x and y, and rounding
    torch.testing.assert_close(position[..., 2][~background], out.depth[~background], atol=1e-5, rtol=1e-5)


def quads_between(lines: Tensor) -> Tensor:
    """Faces of the grid [rows, columns] of vertices, each cell split in two triangles of mixed orientation."""
    rows, columns = lines.shape
    faces = []
    for i in range(rows - 1):
        for j in range(columns - 1):
            a, b = int(lines[i, j]), int(lines[i, j + 1])
            c, d = int(lines[i + 1, j]), int(lines[i + 1, j + 1])
            faces += [(a, b, c), (b, c, d)] if (i + j) % 2 else [(a, d, b), (a, c, d)]
    return torch.tensor(faces)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [0.0, 1 / 256, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_watertight(seed: int, step: float, backend: str, device: torch.device) -> None:
    """A jittered triangulated sheet that fills the image covers every pixel exactly once, whatever lies on centres."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, size = 6, 7, 24
    ys, xs = torch.meshgrid(torch.linspace(0, size, rows), torch.linspace(0, size, columns), indexing="ij")
    jitter = (torch.rand(rows, columns, 2, generator=generator) - 0.5) * 2.2
    jitter[0, :, 1] = jitter[-1, :, 1] = 0
    jitter[:, 0, 0] = jitter[:, -1, 0] = 0
    xy = torch.stack([xs, ys], -1) + jitter
    if step:
        xy = (xy / step).round() * step
    border = torch.stack([xs, ys], -1)
    xy[0, :, 1], xy[-1, :, 1] = border[0, :, 1], border[-1, :, 1]
    xy[:, 0, 0], xy[:, -1, 0] = border[:, 0, 0], border[:, -1, 0]
    vertices = torch.cat([xy.reshape(-1, 2), torch.ones(rows * columns, 1)], 1)[None].to(device)
    faces = quads_between(torch.arange(rows * columns).view(rows, columns)).to(device)

    # One image per triangle, by copies of the vertices: its own in front of the image, the others behind it.
    alone = vertices.repeat(len(faces), 1, 1)
    alone[..., 2] = -1
    alone.scatter_(1, faces[:, :, None].expand(-1, -1, 3), vertices[0, faces])
    count = (run(alone, faces, size, size, backend).face_index >= 0).sum(0)
    assert (count == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fan_covers_its_centre_once(backend: str, device: torch.device) -> None:
    """Many triangles that meet in a pixel centre: exactly one of them covers it."""
    angles = torch.arange(12) * (2 * math.pi / 12)
    rim = torch.stack([8.5 + 7 * angles.cos(), 8.5 + 7 * angles.sin(), torch.ones(12)], 1)
    vertices = torch.cat([tensor([[8.5, 8.5, 1.0]], "cpu"), rim])[None].to(device)
    count = 0
    for i in range(12):
        faces = torch.tensor([[0, 1 + i, 1 + (i + 1) % 12]], device=device)
        count += int(run(vertices, faces, 17, 17, backend).face_index[0, 8, 8] == 0)
    assert count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_left_rule(backend: str, device: torch.device) -> None:
    """A square from centre to centre owns its top row and left column, not its bottom row and right column."""
    square = tensor([[[1.5, 1.5, 1], [4.5, 1.5, 1], [1.5, 4.5, 1], [4.5, 4.5, 1]]], device)
    for order in ([[0, 1, 2], [2, 1, 3]], [[0, 2, 1], [1, 2, 3]]):
        covered = run(square, torch.tensor(order, device=device), 6, 6, backend).face_index[0] >= 0
        expected = torch.zeros(6, 6, dtype=torch.bool, device=device)
        expected[1:4, 1:4] = True
        assert torch.equal(covered, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shift_by_whole_pixels_shifts_the_image(backend: str, device: torch.device) -> None:
    vertices, faces = random_scene(8, "cpu", batch=1, size=(30, 30), extent=12)
    vertices = (vertices * 256).round() / 256
    vertices[..., 2] = vertices[..., 2].abs() + 0.1
    moved = vertices + tensor([4.0, 3.0, 0.0], "cpu")
    first = run(vertices.to(device), faces.to(device), 30, 30, backend)
    second = run(moved.to(device), faces.to(device), 33, 34, backend)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b[:, 3:, 4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_subpixel_shift_moves_the_edge(backend: str, device: torch.device) -> None:
    """A pixel centre 1/256 pixel inside or outside an edge is told apart; less than half of that is not."""
    faces = torch.tensor([[0, 1, 2]], device=device)

    def covers(left: float) -> bool:
        vertices = tensor([[[left, -50.0, 1], [left, 50.0, 1], [60.0, 0.0, 1]]], device)
        return bool(run(vertices, faces, 1, 8, backend).face_index[0, 0, 3] == 0)

    assert covers(3.5) and covers(3.5 - 1 / 256) and not covers(3.5 + 1 / 256)
    assert covers(3.5 + 1 / 1024)


@pytest.mark.parametrize("perspective_correct", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_face(backend: str, perspective_correct: bool, device: torch.device) -> None:
    """Different triangles in one plane of constant depth tie exactly."""
    generator = torch.Generator().manual_seed(0)
    xy = torch.rand(1, 90, 2, generator=generator) * 40
    vertices = torch.cat([xy, torch.full((1, 90, 1), 1.7)], 2).to(device)
    faces = torch.arange(90, device=device).view(30, 3)
    out = run(vertices, faces, 40, 40, backend, perspective_correct=perspective_correct)
    lowest = torch.full((40, 40), -1, dtype=torch.int32, device=device)
    for face in range(29, -1, -1):
        single = run(vertices, faces[face : face + 1], 40, 40, backend).face_index[0]
        lowest[single == 0] = face
    assert torch.equal(out.face_index[0], lowest)
    assert (out.depth[out.face_index >= 0] == torch.tensor(1.7)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cull_drops_faces_seen_from_behind(backend: str, device: torch.device) -> None:
    points, faces = sphere(2)
    vertices = (points * tensor([10, -10, -1], "cpu") + tensor([16, 16, 3], "cpu"))[None].to(device)
    faces = faces.to(device)
    both = run(vertices, faces, 32, 32, backend)
    assert_same(run(vertices, faces, 32, 32, backend, cull=True), both)  # a closed surface hides its back
    assert (both.depth[both.face_index >= 0] < 3).all()
    inside_out = run(vertices, faces.flip(1), 32, 32, backend, cull=True)
    assert (inside_out.depth[inside_out.face_index >= 0] > 2.99).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_perspective_correct_interpolation(backend: str, device: torch.device) -> None:
    """Attributes on a slanted plane, rendered through a pinhole, against the plane's intersection with the ray."""
    corners = torch.tensor([[-1.0, -1, 2], [3, -1, 6], [0, 2.5, 3]], dtype=torch.float64)
    focal, centre = 30.0, 20.0
    xy = corners[:, :2] / corners[:, 2:] * focal + centre
    vertices = torch.cat([xy, corners[:, 2:]], 1).float()[None].to(device)
    faces = torch.tensor([[0, 1, 2]], device=device)
    out = run(vertices, faces, 40, 40, backend, perspective_correct=True)
    hit = out.face_index[0] == 0
    assert hit.sum() > 50
    row, column = hit.nonzero(as_tuple=True)
    ray = torch.stack([column + 0.5 - centre, row + 0.5 - centre, torch.full_like(row, int(focal))], 1).double().cpu()
    normal = torch.linalg.cross(corners[1] - corners[0], corners[2] - corners[0])
    point = ray * ((corners[0] @ normal) / (ray @ normal))[:, None]
    torch.testing.assert_close(out.depth[0][hit].double().cpu(), point[:, 2], rtol=3e-3, atol=0)
    actual = interpolate(corners.to(device)[None], faces, out)[0][hit].cpu()
    torch.testing.assert_close(actual, point, rtol=0, atol=2e-2)  # the grid of 1/256 pixel
    linear = run(vertices, faces, 40, 40, backend)
    assert (linear.depth[0][hit].double().cpu() - point[:, 2]).abs().max() > 0.1
