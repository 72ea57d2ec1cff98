"""The rasteriser's contract beside the picture itself: hostile input, types, repeatability, tracing, CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from raster_cases import BACKENDS, assert_same, random_scene, run, tensor
from torch import Tensor

from fastmetro_kernels import RasterOutput, interpolate, rasterize


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
def test_vertices_shared_by_the_batch(backend: str, device: torch.device) -> None:
    vertices, faces = random_scene(4, device, batch=1)
    single = run(vertices, faces, 37, 53, backend)
    shared = run(vertices.expand(3, -1, -1), faces, 37, 53, backend)
    assert_same(shared, RasterOutput(*(field.expand(3, *field.shape[1:]) for field in single)))


def test_every_element_is_written(device: torch.device) -> None:
    """Deterministic mode fills fresh memory with NaN and the largest integers."""
    vertices, faces = random_scene(4, device)
    expected = run(vertices, faces, 37, 53, "native")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all(), "poisoning works"
        assert_same(run(vertices, faces, 37, 53, "native"), expected)
        nothing = run(vertices, faces[:0], 37, 53, "native")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (nothing.face_index == -1).all() and (nothing.barycentrics == 0).all() and nothing.depth.isposinf().all()


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
        assert torch.autograd.gradcheck(lambda a: interpolate(a, faces, out), attributes, nondet_tol=1e-12)
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
        ({"width": 4.5}, TypeError, "width must be an int, got float"),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_large_triangles_than_the_work_list_holds() -> None:
    """65,536 triangles whose boxes fill the image fit the list; warps keep the rest, here the nearest ones."""
    count = 70_000
    corners = torch.tensor([[-5.0, -5.0], [101.0, 101.0], [0.0, 0.0]]).repeat(count, 1, 1)
    corners[:, 2] = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) * 96
    depth = torch.linspace(2, 1, count).view(count, 1, 1).expand(count, 3, 1)
    vertices = torch.cat([corners, depth], 2).view(1, 3 * count, 3)
    faces = torch.arange(3 * count).view(count, 3)
    expected = rasterize(vertices, faces, 96, 96, backend="native")
    visible = expected.face_index.unique()
    assert len(visible) > 10 and (visible > 65_536).any()
    actual = run(vertices.cuda(), faces.cuda(), 96, 96, "native")
    assert_same(RasterOutput(*(field.cpu() for field in actual)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", BACKENDS)
def test_device_that_is_not_the_current_one(backend: str) -> None:
    vertices, faces = random_scene(1, "cpu")
    actual = run(vertices.to("cuda:1"), faces.to("cuda:1"), 37, 53, backend)
    assert actual.depth.device.index == 1
    assert_same(RasterOutput(*(field.cpu() for field in actual)), run(vertices, faces, 37, 53, "reference"))
