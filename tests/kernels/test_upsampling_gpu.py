"""What only a GPU can show of sparse_upsample: configurations, launches that overlap, and repeated runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_upsampling import (
    FLOAT,
    HALF,
    SHAPES,
    check_product,
    mesh_like_matrix,
    random_input,
    random_matrix,
)
from torch import Tensor

from fastmetro_kernels import SparseMatrix, backends, sparse_upsample
from fastmetro_kernels.points import Cut, build_points
from fastmetro_kernels.upsampling import ops

why = backends.native_reasons("upsample_native", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why), reason="; ".join(why))]


PointTables = tuple[Tensor | None, list[int]]


def product_as(
    matrix: SparseMatrix, x: Tensor, plan: tuple[int, int, int, bool], point_tables: PointTables = (None, [])
) -> Tensor:
    m = matrix
    return ops.upsample_native_as(
        x, m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.shape[0], *point_tables, *plan
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["three-per-row", "uneven", "long"])
def test_every_configuration_gives_the_same_bits(shape: str, dtype: torch.dtype) -> None:
    matrix = SHAPES[shape][0].to("cuda")
    word = 4 // dtype.itemsize
    plans = [(0, tile, threads) for tile in (1, 4, 8) for threads in (0, 64, 256)]
    plans += [(1, word * tile, threads) for tile in (1, 2, 4) for threads in (64, 1024)]
    for batch in (1, 7, 300):
        x = random_input(matrix, batch, 3, dtype, "cuda")
        expected = sparse_upsample(x, matrix, backend="native")
        check_product(expected, matrix, x)
        for plan in plans:
            for early in (False, True):
                got = product_as(matrix, x, (*plan, early))
                assert torch.equal(got, expected), (plan, early)


def tables(matrix: SparseMatrix, cut: tuple[int, int]) -> PointTables:
    """The tables of one cut on the GPU."""
    words, sizes = build_points(matrix.to_scipy(), [cut])
    assert sizes
    return torch.from_numpy(words).cuda(), sizes


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [3, (0, 3), (1, 9), (0, 30), (6, 50)], ids=str)
def test_points_give_the_same_bits(lengths: int | tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random_matrix(700, 240, lengths).to("cuda")
    built = [build_points(matrix.to_scipy(), [cut]) for cut in ((8, 12), (16, 20), (32, 9))]
    found = [(torch.from_numpy(words).cuda(), sizes) for words, sizes in built if sizes]
    assert found
    most = 16 if dtype.itemsize == 2 and lengths != 3 else 32  # warps for which packs of 16 bytes leave registers
    for batch in (1, 2, 7, 300, 1111):
        x = random_input(matrix, batch, 3, dtype, "cuda")
        expected = product_as(matrix, x, (0, 1, 0, False))
        check_product(expected, matrix, x)
        for point_tables in found:
            words = (8, 16) if Cut(*point_tables[1]).threads <= 32 * most else (8,)
            for tile in (word // dtype.itemsize for word in words):
                for early in (False, True):
                    got = product_as(matrix, x, (2, tile, 0, early), point_tables)
                    assert torch.equal(got, expected), (point_tables[1], tile, early)


def test_tables_are_made_on_the_way_to_the_gpu() -> None:
    """Once, also where the matrix is part of a model; a copy keeps them."""
    matrix = mesh_like_matrix(1723, 431)
    assert not matrix.point_cuts and matrix.point_tables.numel() == 0
    torch.nn.Sequential(matrix).to("cuda")
    assert matrix.point_cuts and matrix.t_point_cuts and matrix.point_tables.is_cuda
    before = matrix.point_tables
    assert matrix.to("cuda").point_tables is before
    again = copy.deepcopy(matrix).cpu().to("cuda")
    assert torch.equal(again.point_tables, before) and again.point_cuts == matrix.point_cuts


def test_early_launches_wait_for_what_they_read() -> None:
    up = mesh_like_matrix(6890, 1723).to("cuda")
    down = up.transpose()
    up_points, down_points = tables(up, (16, 14)), tables(down, (16, 16))

    def chain(early: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            y = x
            for _ in range(20):
                y = product_as(up, y, (0, 8, 0, early))
                y = product_as(down, y, (1, 1, 512, early))
                y = product_as(up, y, (2, 4, 0, early), up_points)
                y = product_as(down, y, (2, 4, 0, early), down_points)
                y = product_as(up, y, (2, 2, 0, early), up_points)
                y = product_as(down, y, (2, 2, 0, early), down_points)
                y = product_as(up, y, (0, 4, 0, early))
                y = product_as(down, y, (0, 4, 256, early))
                y = y / y.abs().amax()  # kernels of PyTorch in between
            return y

        return run

    x = random_input(up, 32, 3, FLOAT, "cuda")
    expected = chain(False)()
    run = chain(True)
    assert all(torch.equal(run(), expected) for _ in range(5))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("batch", [1, 32, 256])
def test_hundred_runs_give_the_same_bits(batch: int) -> None:
    matrix = mesh_like_matrix(6890, 1723).to("cuda")
    x = random_input(matrix, batch, 3, FLOAT, "cuda").requires_grad_()
    grad = torch.randn(batch, 6890, 3, generator=torch.Generator().manual_seed(0)).cuda()
    out = sparse_upsample(x, matrix, backend="native")
    (grad_x,) = torch.autograd.grad(out, x, grad)
    check_product(out.detach()[:2], matrix, x.detach()[:2])
    check_product(grad_x[:2], matrix, grad[:2], transposed=True)
    for _ in range(100):
        again = sparse_upsample(x, matrix, backend="native")
        assert torch.equal(again, out)
        assert torch.equal(torch.autograd.grad(again, x, grad)[0], grad_x)


def test_impossible_plans_are_refused() -> None:
    matrix = random_matrix(9, 5, 3).to("cuda")
    x = random_input(matrix, 2, 3, FLOAT, "cuda")
    with pytest.raises(RuntimeError, match="no kernel for tiles of so many"):
        product_as(matrix, x, (0, 3, 0, False))
    with pytest.raises(RuntimeError, match="does not fit in shared memory"):
        product_as(matrix, x[..., :2], (1, 4, 64, False))
    with pytest.raises(RuntimeError, match="threads must be a multiple of 32"):
        product_as(matrix, x, (0, 4, 100, False))
