"""The rasteriser: exact coverage, the same bits on every backend, and nothing that bad input can break."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmetro_kernels import BackendUnavailable, RasterOutput, interpolate, rasterize

BACKENDS = ["reference", "native"]


def run(vertices: Tensor, faces: Tensor, height: int, width: int, backend: str, **options: bool) -> RasterOutput:
    try:
        return rasterize(vertices, faces, height, width, backend=backend, **options)
    except BackendUnavailable as error:
        if vertices.device.type == "cpu":
            raise
        pytest.skip(str(error))


def tensor(values: object, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def random_scene(
    seed: int,
    device: torch.device | str,
    batch: int = 2,
    triangles: int = 60,
    size: tuple[int, int] = (37, 53),
    extent: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """Triangle soup that reaches outside the image, with some coordinates exactly on pixel centres and edges."""
    generator = torch.Generator().manual_seed(seed)
    count = triangles * 3
    height, width = size
    centre = torch.rand(batch, triangles, 2, generator=generator) * torch.tensor([width + 10.0, height + 10.0]) - 5
    centre = centre.repeat_interleave(3, 1)
    xy = centre + (torch.rand(batch, count, 2, generator=generator) - 0.5) * extent
    snapped = torch.rand(batch, count, 1, generator=generator) < 0.3
    xy = torch.where(snapped, (xy * 2).round() / 2, xy)
    z = torch.rand(batch, count, 1, generator=generator) * 3 + 0.05
    z = torch.where(torch.rand(batch, count, 1, generator=generator) < 0.03, -z, z)
    faces = torch.arange(count).view(triangles, 3)
    return torch.cat([xy, z], 2).to(device), faces.to(device)


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


def assert_same(actual: RasterOutput, expected: RasterOutput) -> None:
    assert torch.equal(actual.face_index, expected.face_index)
    assert torch.equal(actual.depth, expected.depth)
    assert torch.equal(actual.barycentrics, expected.barycentrics)


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


@pytest.mark.parametrize("perspective_correct", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_vertices(backend: str, perspective_correct: bool, device: torch.device) -> None:
    """NaN, infinite, huge and tiny coordinates drop or keep their own triangles only."""
    good = [[2.0, 2.0, 1.0], [30.0, 2.0, 1.0], [2.0, 30.0, 1.0]]
    nan, inf = math.nan, math.inf
    bad = [
        [nan, 1, 1],
        [1, nan, 1],
        [1, 1, nan],
        [inf, 1, 1],
        [-inf, 1, 1],
        [1, inf, 1],
        [1, 1, inf],
        [1, 1, -inf],
        [3e38, 1, 1],
        [1, -3e38, 1],
        [2.0**21 + 1, 0, 1],
        [0, -(2.0**21) - 1, 1],
        [1, 1, 0.0],
        [1, 1, -0.0],
        [1, 1, -1e-30],
    ]
    vertices = tensor([good + bad], device)
    faces = [[0, 3 + i, 1] for i in range(len(bad))] + [[0, 0, 1], [0, 0, 0], [0, 1, 2]]
    options = {"perspective_correct": perspective_correct}
    out = run(vertices, torch.tensor(faces, device=device), 32, 32, backend, **options)
    assert set(out.face_index.unique().tolist()) == {-1, len(faces) - 1}
    kept = [[-(2.0**21), -5.0, 1e-44], [2.0**21, -5.0, 1e38], [0.0, 2.0**21, 1e-20]]
    out = run(tensor([kept], device), torch.tensor([[0, 1, 2]], device=device), 32, 32, backend, **options)
    assert (out.face_index == 0).all() and out.depth.isfinite().all() and (out.depth > 0).all()
    assert out.barycentrics.isfinite().all()
    expected = run(tensor([kept], device), torch.tensor([[0, 1, 2]], device=device), 32, 32, "reference", **options)
    assert_same(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend: str, device: torch.device) -> None:
    some = torch.tensor([[0, 1, 2]], device=device)
    none = torch.empty(0, 3, dtype=torch.int64, device=device)
    for batch, count, faces in ((0, 5, some), (2, 5, none), (2, 0, none), (0, 0, none)):
        out = run(torch.ones(batch, count, 3, device=device), faces, 4, 5, backend)
        assert out.face_index.shape == (batch, 4, 5) and (out.face_index == -1).all()
        assert torch.isinf(out.depth).all() and (out.barycentrics == 0).all()
        assert interpolate(torch.ones(batch, count, 2, device=device), faces, out).shape == (batch, 4, 5, 2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_types_and_strides(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    vertices, faces = random_scene(4, device)
    vertices = vertices.round()  # exact in every type
    vertices[..., 2] = 1
    expected = run(vertices, faces, 37, 53, "reference")
    strided = torch.stack([vertices, vertices + 9], -1)[..., 0]
    transposed = faces.t().contiguous().t().to(dtype)
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    assert_same(run(strided, transposed, 37, 53, backend), expected)
    for float_type in (torch.float16, torch.bfloat16, torch.float64):
        assert_same(run(vertices.to(float_type), faces.to(dtype), 37, 53, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_items_are_independent_and_repeatable(backend: str, device: torch.device) -> None:
    vertices, faces = random_scene(6, device, batch=5, triangles=500, extent=9)
    whole = run(vertices, faces, 37, 53, backend)
    for item in range(5):
        single = run(vertices[item : item + 1], faces, 37, 53, backend)
        assert_same(single, RasterOutput(*(field[item : item + 1] for field in whole)))
    for _ in range(3):
        assert_same(run(vertices, faces, 37, 53, backend), whole)


def test_threads_do_not_matter() -> None:
    vertices, faces = random_scene(7, "cpu", batch=1, triangles=400, size=(130, 90), extent=60)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(vertices, faces, 130, 90, "native")
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert_same(run(vertices, faces, 130, 90, "native"), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(230, 260), (1100, 30)])
def test_large_triangles_among_small_ones(size: tuple[int, int], device: torch.device) -> None:
    """Full-screen, medium and tiny triangles together: on CUDA they take three different paths."""
    height, width = size
    tiny, faces = random_scene(9, device, batch=2, triangles=300, size=size, extent=4)
    medium, medium_faces = random_scene(10, device, batch=2, triangles=30, size=size, extent=40)
    large, large_faces = random_scene(12, device, batch=2, triangles=8, size=size, extent=3000)
    vertices = torch.cat([tiny, medium, large], 1)
    offset = [0, tiny.shape[1], tiny.shape[1] + medium.shape[1]]
    faces = torch.cat([faces, medium_faces + offset[1], large_faces + offset[2]])
    faces = faces[torch.randperm(len(faces), generator=torch.Generator().manual_seed(0)).to(device)]
    expected = run(vertices, faces, height, width, "reference")
    assert_same(run(vertices, faces, height, width, "native"), expected)


def test_interpolate_gradients(device: torch.device) -> None:
    vertices, faces = random_scene(2, device, batch=2, triangles=10, size=(6, 7), extent=9)
    out = rasterize(vertices, faces, 6, 7, backend="reference")
    for shape in ((2, vertices.shape[1], 2), (vertices.shape[1], 2)):
        attributes = torch.rand(shape, dtype=torch.float64, device=device, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: interpolate(a, faces, out), attributes)
    poisoned = torch.full((vertices.shape[1], 1), math.nan, device=device)
    image = interpolate(poisoned, faces, out)[..., 0]
    assert torch.equal(image.isnan(), out.face_index >= 0) and (image[out.face_index < 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_carry_no_gradient(backend: str, device: torch.device) -> None:
    vertices, faces = random_scene(2, device)
    out = run(vertices.requires_grad_(), faces, 37, 53, backend)
    assert not any(field.requires_grad for field in out)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"vertices": torch.ones(4, 3)}, ValueError, "vertices must be"),
        ({"vertices": torch.ones(1, 4, 2)}, ValueError, "vertices must be"),
        ({"vertices": torch.ones(1, 4, 3, dtype=torch.int64)}, TypeError, "vertices must be"),
        ({"vertices": [[0.0, 0.0, 1.0]]}, TypeError, "vertices must be"),
        ({"faces": torch.zeros(3, dtype=torch.int64)}, ValueError, "faces must be"),
        ({"faces": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, "faces must be"),
        ({"faces": torch.zeros(1, 3)}, TypeError, "faces must be"),
        ({"faces": torch.tensor([[0, 1, 4]])}, ValueError, "0..3"),
        ({"faces": torch.tensor([[0, -1, 2]])}, ValueError, "-1"),
        ({"faces": torch.tensor([[0, 1, 2**32]])}, ValueError, "0..3"),
        ({"height": 0}, ValueError, "height"),
        ({"width": 16385}, ValueError, "width"),
        ({"backend": "opengl"}, ValueError, "native"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {
        "vertices": torch.ones(1, 4, 3),
        "faces": torch.tensor([[0, 1, 2]]),
        "height": 4,
        "width": 4,
    }
    call: Callable[..., RasterOutput] = rasterize
    with pytest.raises(error, match=words):
        call(**(arguments | change))


def test_native_never_reads_out_of_bounds(device: torch.device) -> None:
    """The op itself, past the checks of the function: bad faces are dropped."""
    run(torch.ones(1, 1, 3, device=device), torch.zeros(1, 3, dtype=torch.int64, device=device), 1, 1, "native")
    vertices = tensor([[[0, 0, 1], [9, 0, 1], [0, 9, 1]]], device)
    for dtype, far in ((torch.int32, 2**31 - 1), (torch.int64, 2**62)):
        corners = [[0, 1, far], [-1, 1, 2], [0, 3, 1], [-far, far, 0], [0, 1, 2]]
        faces = torch.tensor(corners, dtype=dtype, device=device)
        index, _, _ = torch.ops.fastmetro_kernels.rasterize_native(vertices, faces, 8, 8, False, False)
        assert set(index.unique().tolist()) == {-1, 4}


def test_op_registration(device: torch.device) -> None:
    vertices, faces = random_scene(1, device)
    run(vertices, faces, 37, 53, "native")
    torch.library.opcheck(torch.ops.fastmetro_kernels.rasterize_native.default, (vertices, faces, 37, 53, False, True))


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    vertices, faces = random_scene(1, device)
    expected = run(vertices, faces, 37, 53, "native")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(positions: Tensor, triangles: Tensor) -> RasterOutput:
        return rasterize(positions * 1, triangles, 37, 53, backend="native")

    assert_same(compiled(vertices, faces), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graph() -> None:
    device = torch.device("cuda")
    vertices, faces = random_scene(1, device, triangles=300, size=(200, 220), extent=60)
    other, _ = random_scene(2, device, triangles=300, size=(200, 220), extent=300)
    run(vertices, faces, 200, 220, "native")
    static = vertices.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rasterize(static, faces, 200, 220, backend="native")
    for scene in (other, vertices, other):
        static.copy_(scene)
        graph.replay()
        assert_same(captured, rasterize(scene, faces, 200, 220, backend="reference"))
