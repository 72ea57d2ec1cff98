"""render_crops against float64 on every backend and device, whatever the pictures and maps, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fused_cases import FLOAT, RUNNERS, Runner, poisoned_memory
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused import CropMap, render_crops
from fastmetro_kernels.fused.crops import ops, reference

SINGLE = [runner for runner in RUNNERS if runner.dtype == FLOAT]
everywhere = pytest.mark.parametrize("runner", SINGLE, ids=str)
on_triton = pytest.mark.parametrize("runner", [r for r in SINGLE if r.backend == "triton"], ids=str)
on_cuda = pytest.mark.parametrize("runner", [r for r in SINGLE if (r.backend, r.device) == ("triton", "cuda")], ids=str)
both = pytest.mark.parametrize("fixed", [False, True])
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PICTURES = [(23, 31), (1, 1), (40, 7), (0, 0), (17, 60)]
"""Height and width; the last but one is empty."""


def make(pictures: list[tuple[int, int]], size: int, seed: int = 0) -> dict[str, Any]:
    """Turned, enlarged and shrunk crops of random pictures, many of whose samples lie outside."""
    random = np.random.default_rng(seed)
    count, side = len(pictures), 2 * size
    pixels = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in pictures]
    ends = np.cumsum([one.size for one in pixels])
    packed = np.concatenate([one.reshape(-1) for one in pixels] + [np.full(1, 255, np.uint8)])
    angle = random.uniform(-np.pi, np.pi, count)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    extent = np.array(pictures)[:, ::-1]
    turn *= (random.uniform(0.5, 1.5, count) * (extent.max(1) + 1) / side)[:, None, None]
    start = extent / 2 - turn @ np.full(2, side / 2) + random.uniform(-3, 3, (count, 2))
    origin = random.integers(-4, 5, (count, 2)).astype(np.float64)
    matrix = np.concatenate([turn, (start + origin)[:, :, None]], 2).reshape(count, 6)
    places = np.arange(side) + random.uniform(0, 0.5, (count, 1))
    weights = torch.from_numpy(random.uniform(0, 1, (2, count, side))).float()
    return {
        "pixels": torch.from_numpy(packed), "offsets": torch.from_numpy(ends - [one.size for one in pixels]),
        "sizes": torch.tensor(pictures), "factor": torch.from_numpy(random.uniform(0.6, 1.4, (count, 3))).float(),
        "places": CropMap(*(torch.from_numpy(one) for one in (matrix, places, places + 0.25)), *weights,
                          torch.from_numpy(origin)),
        "mean": MEAN, "deviation": DEVIATION,
    }  # fmt: skip


def moved(given: dict[str, Any], device: str) -> dict[str, Any]:
    """On another device."""
    places = CropMap(*(one.to(device) for one in given["places"]))
    return {name: one.to(device) for name, one in given.items() if name != "places"} | {"places": places}


def exact(given: dict[str, Any], fixed: bool) -> Tensor:
    """In float64, a picture and a sample at a time: padded with black on all sides, and gathered."""
    found = []
    matrices, columns, rows, column_weights, row_weights, origins = (one.double().numpy() for one in given["places"])
    for number, (height, width) in enumerate(given["sizes"].tolist()):
        begin = int(given["offsets"][number])
        picture = given["pixels"][begin : begin + 3 * height * width].numpy().reshape(height, width, 3).astype(float)
        padded = np.zeros((height + 4, width + 4, 3))
        padded[2:-2, 2:-2] = picture
        x, y = np.meshgrid(columns[number], rows[number])
        (a, b, c), (d, e, f) = matrices[number].reshape(2, 3)
        if fixed:
            u = np.floor((np.rint(a * x * 1024) + np.rint((b * y + c) * 1024) + 16) / 32) / 32
            v = np.floor((np.rint(d * x * 1024) + np.rint((e * y + f) * 1024) + 16) / 32) / 32
        else:
            u, v = a * x + b * y + c, d * x + e * y + f
        u, v = np.clip(u - origins[number, 0], -2, width), np.clip(v - origins[number, 1], -2, height)
        left, top = np.floor(u).astype(int), np.floor(v).astype(int)
        right, lower = (u - left)[..., None], (v - top)[..., None]
        upper = padded[top + 2, left + 2] * (1 - right) + padded[top + 2, left + 3] * right
        below = padded[top + 3, left + 2] * (1 - right) + padded[top + 3, left + 3] * right
        weights = np.outer(row_weights[number], column_weights[number])[..., None]
        sampled = (upper * (1 - lower) + below * lower) * weights
        size = len(x) // 2
        total = sampled.reshape(size, 2, size, 2, 3).sum((1, 3)) * given["factor"][number].double().numpy()
        unit = np.clip(total, 0, 255) / 255
        found.append(((unit - given["mean"].double().numpy()) / given["deviation"].double().numpy()).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(found))


def check(runner: Runner, given: dict[str, Any], fixed: bool) -> Tensor:
    """Against float64: a few roundings of a number up to 255, or a share of a pixel's difference."""
    with poisoned_memory():
        got = render_crops(**moved(given, runner.device), fixed=fixed, backend=runner.backend)
    want = exact(given, fixed)
    assert got.dtype == FLOAT and got.shape == want.shape and got.is_contiguous() and bool(got.isfinite().all())
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=16 * 2**-24 / 0.22)
    return got


@pytest.mark.parametrize("size", [1, 5, 23])
@both
@everywhere
def test_against_float64(runner: Runner, fixed: bool, size: int) -> None:
    got = check(runner, make(PICTURES, size, size), fixed)
    black = torch.broadcast_to((-MEAN / DEVIATION)[:, None, None], got[3].shape)
    torch.testing.assert_close(got[3].cpu(), black)
    assert size < 5 or float(got[0].std()) > 0.1


@both
@on_cuda
def test_crops_of_photographs(runner: Runner, fixed: bool) -> None:
    check(runner, make([(480, 640), (300, 300), (671, 1000)] * 30, 224), fixed)


@both
@everywhere
def test_ties_are_rounded_to_the_even_32nd(runner: Runner, fixed: bool) -> None:
    """Positions at every 2048th of a pixel, of which each other one decides by a half between two 32nds."""
    given = make([(9, 70)], 32)
    matrix = torch.tensor([[1 / 2048, 0, 1.5 + 1 / 1024, 0, 1 / 2048, 2.25]], dtype=torch.float64)
    numbers = torch.arange(64, dtype=torch.float64)[None]
    nowhere = torch.zeros_like(matrix[:, :2])
    places = given["places"]._replace(matrix=matrix, columns=numbers, rows=numbers + 1, origin=nowhere)
    check(runner, given | {"places": places}, fixed)


@everywhere
def test_strides_do_not_matter(runner: Runner) -> None:
    given = moved(make(PICTURES, 6), runner.device)
    expected = render_crops(**given, backend=runner.backend)
    apart = {name: one.repeat_interleave(2, 0)[::2] for name, one in given.items() if name != "places"}
    places = CropMap(*(one.repeat_interleave(2, -1)[..., ::2] for one in given["places"]))
    assert torch.equal(render_crops(**apart, places=places, backend=runner.backend), expected)
    shared = given["places"]._replace(rows=given["places"].rows[:1].expand(len(PICTURES), -1))
    copied = shared._replace(rows=shared.rows.contiguous())
    one, other = (render_crops(**given | {"places": x}, backend=runner.backend) for x in (shared, copied))
    assert torch.equal(one, other)


@everywhere
def test_sizes_that_lie_are_not_read_beyond_the_pixels(runner: Runner) -> None:
    """Rows of strangers' files are checked before, but a kernel must not read what is not its own."""
    given = moved(make([(5, 5)] * 4, 8), runner.device)
    given["sizes"] = torch.tensor([[5, 5], [10**6, 10**6], [5, 5], [2**40, 1]], device=runner.device)
    given["offsets"] = torch.tensor([0, 75, -(10**6), 2**50], device=runner.device)
    got = render_crops(**given, backend=runner.backend)
    black = torch.broadcast_to((-MEAN / DEVIATION)[:, None, None], got[0].shape)
    assert bool(got.isfinite().all())
    for number in (2, 3):
        torch.testing.assert_close(got[number].cpu(), black)


@everywhere
def test_no_crops(runner: Runner) -> None:
    given = moved(make(PICTURES, 4), runner.device)
    none = {name: one[:0] if name in ("offsets", "sizes", "factor") else one for name, one in given.items()}
    none["places"] = CropMap(*(one[:0] for one in given["places"]))
    assert render_crops(**none, backend=runner.backend).shape == (0, 3, 4, 4)


def test_more_crops_than_are_made_at_a_time() -> None:
    given = make([(4, 4)] * (reference._CHUNK + 2), 2)
    torch.testing.assert_close(render_crops(**given).double(), exact(given, False), rtol=0, atol=16 * 2**-24 / 0.22)


@on_triton
def test_opcheck(runner: Runner) -> None:
    given = moved(make(PICTURES[:2], 3), runner.device)
    arguments = [given[name] for name in ("pixels", "offsets", "sizes")]
    arguments += [list(given["places"]), given["factor"], given["mean"], given["deviation"]]
    for fixed in (False, True):
        torch.library.opcheck(ops.render_crops_triton, (*arguments, fixed))
    with pytest.raises(RuntimeError, match="places must be 6 tensors"):
        ops.render_crops_triton(*arguments[:3], arguments[3][:5], *arguments[4:], False)
    with pytest.raises(RuntimeError, match="sizes must be"):
        ops.render_crops_triton(*arguments[:2], arguments[2][:1], *arguments[3:], False)


@on_triton
def test_compiles_without_graph_breaks(runner: Runner) -> None:
    torch._dynamo.reset()

    def block(given: dict[str, Any]) -> Tensor:
        return 2 * render_crops(**given, backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for size in (3, 4):
        given = moved(make(PICTURES, size), runner.device)
        assert torch.equal(compiled(given), block(given))


@on_cuda
def test_captured_in_a_cuda_graph(runner: Runner) -> None:
    given, other = (moved(make(PICTURES, 40, seed), runner.device) for seed in (0, 1))
    render_crops(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = render_crops(**given)
    given["pixels"].copy_(other["pixels"])
    given["factor"].copy_(other["factor"])
    graph.replay()
    assert torch.equal(captured, render_crops(**given))


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("pixels", lambda x: x.float(), TypeError, "pixels must be one of uint8, got torch.float32"),
        ("pixels", lambda x: x[:0], ValueError, "pixels not empty"),
        ("pixels", lambda x: x[None], ValueError, r"pixels must be torch.uint8 \['N'\]"),
        ("offsets", lambda x: x.int(), TypeError, "offsets must be one of int64, got torch.int32"),
        ("offsets", lambda x: x[:-1], ValueError, r"sizes must be torch.int64 \[4, 2\], got torch.int64 \[5, 2\]"),
        ("sizes", lambda x: x[:, :1], ValueError, r"sizes must be torch.int64 \[5, 2\]"),
        ("sizes", lambda x: x.tolist(), TypeError, "sizes must be a tensor, got list"),
        ("factor", lambda x: x.double(), TypeError, "factor must be one of float32"),
        ("mean", lambda x: x.to("meta"), ValueError, "mean must be on cpu, got meta"),
        ("deviation", lambda x: x[:2], ValueError, r"deviation must be torch.float32 \[3\], got torch.float32 \[2\]"),
        ("places", lambda x: x._replace(rows=x.rows[:, 1:]), ValueError, r"rows must be torch.float64 \[5, 8\]"),
        ("places", lambda x: x._replace(matrix=x.matrix.float()), TypeError, "matrix must be one of float64"),
    ],
)
def test_errors_name_the_argument(name: str, wrong: Any, error: type[Exception], message: str) -> None:
    given = make(PICTURES, 4)
    with pytest.raises(error, match=message):
        render_crops(**given | {name: wrong(given[name])})


def test_odd_maps_gradients_and_backends_are_refused() -> None:
    given = make(PICTURES, 4)
    odd = CropMap(*(one[:, :7] if one.shape[1] == 8 else one for one in given["places"]))
    with pytest.raises(ValueError, match=r"columns must be \[B, 2S\]"):
        render_crops(**given | {"places": odd})
    with pytest.raises(RuntimeError, match=r"no gradients.*factor requires grad"):
        render_crops(**given | {"factor": given["factor"].clone().requires_grad_()})
    with pytest.raises(ValueError, match="backend='apex' is not known"):
        render_crops(**given, backend="apex")
    on_meta = moved(given, "meta")
    assert render_crops(**on_meta).shape == (5, 3, 4, 4)
    with pytest.raises(BackendUnavailable):
        render_crops(**on_meta, backend="triton")
