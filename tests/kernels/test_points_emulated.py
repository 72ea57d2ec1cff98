"""The kernel for large batches of points, compiled as host code."""

from __future__ import annotations

import pytest
import torch
from emulation import build
from emulation.upsampling import GATHER, POINTS, Plan, upsample
from test_upsampling import FLOAT, HALF, check_product, mesh_like_matrix, random_matrix, strided_inputs
from torch import Tensor

from fastmetro_kernels import SparseMatrix
from fastmetro_kernels.points import build_points

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))

DTYPES = [FLOAT, HALF, torch.bfloat16]
CASES = [
    *((3, (1, 5)), (3, (2, 4)), (3, (3, 9)), ((2, 3), (2, 4)), ((0, 3), (2, 9)), ((0, 5), (2, 9)), ((5, 8), (5, 9))),
    *(((1, 16), (4, 16)), ((0, 30), (8, 16)), ((6, 50), (20, 12))),
]
"""Lengths of rows and cuts (blocks, warps of a block)."""


def arrays_of(matrix: SparseMatrix, transposed: bool) -> tuple[object, ...]:
    m = matrix
    if transposed:
        return m.t_row_offsets, m.t_columns, m.t_values, m.t_ell_columns, m.t_ell_values, m.shape[1]
    return m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.shape[0]


def product(
    matrix: SparseMatrix,
    x: Tensor,
    cut: tuple[int, int],
    bytes_read: int = 16,
    transposed: bool = False,
    **options: object,
) -> Tensor:
    """The product by one cut, with words of so many bytes; skips where the matrix cannot be cut so."""
    csr = matrix.to_scipy()
    words, sizes = build_points(csr.T.tocsr() if transposed else csr, [cut])
    if not sizes:
        pytest.skip("the rows do not fit the registers of so few blocks")
    plan = Plan(POINTS, bytes_read // x.element_size())
    return upsample(x, *arrays_of(matrix, transposed), torch.from_numpy(words), sizes, plan=plan, **options)


def gathered(matrix: SparseMatrix, x: Tensor, transposed: bool = False) -> Tensor:
    """The same bits are expected from every kernel; this one is the simplest."""
    found = upsample(x, *arrays_of(matrix, transposed), plan=Plan(GATHER, 4))
    check_product(found, matrix, x, transposed)
    return found


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "cut"), CASES)
def test_bits_of_gathering(
    lengths: int | tuple[int, int], cut: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    """Whatever share of the batch a block gets, and whether or not it ends in the middle of a pack."""
    matrix = random_matrix(131, 61, lengths)
    for batch in (1, 4, 7, 21):
        x = torch.randn(batch, matrix.shape[0 if transposed else 1], 3).to(dtype)
        expected = gathered(matrix, x, transposed)
        for bytes_read in (8, 16):
            for multiprocessors in (1, 100):
                got = product(matrix, x, cut, bytes_read, transposed, multiprocessors=multiprocessors)
                assert torch.equal(got, expected)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
@pytest.mark.parametrize("lengths", [3, (0, 30)])
def test_any_order_of_threads(schedule: str, lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(131, 61, lengths)
    x = torch.randn(23, 61, 3)
    got = product(matrix, x, (5, 16), multiprocessors=10, schedule=schedule)
    assert torch.equal(got, gathered(matrix, x))


@pytest.mark.parametrize("lengths", [3, (0, 9)])
def test_strided_inputs(lengths: int | tuple[int, int]) -> None:
    """Nothing is read outside of x, wherever it lies."""
    matrix = random_matrix(131, 61, lengths)
    for dtype in (FLOAT, HALF):
        for name, x in strided_inputs(matrix.shape[1], 3, "cpu").items():
            x = x.to(dtype, memory_format=torch.preserve_format)
            assert torch.equal(product(matrix, x, (3, 9)), gathered(matrix, x.contiguous())), name


@pytest.mark.parametrize("lengths", [3, (0, 9), (0, 30)])
def test_nan_stays_where_it_belongs(lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(131, 61, lengths)
    for bad in (torch.nan, torch.inf):
        x = torch.randn(5, 61, 3)
        x[1, 7] = bad
        hit = torch.zeros(5, 131, 3, dtype=torch.bool)
        hit[1] = (matrix.to_dense()[:, 7] != 0)[:, None]
        assert torch.equal(~product(matrix, x, (5, 12), multiprocessors=1).isfinite(), hit)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 3), (33, 3, 3), (12, 5, (0, 5)), (7, 1, (0, 1)), (1, 40, 40)])
def test_tiny_matrices(shape: tuple[int, int, int | tuple[int, int]]) -> None:
    matrix = random_matrix(*shape)
    x = torch.randn(9, shape[1], 3)
    if matrix.nnz > 32 * matrix.shape[0]:
        assert build_points(matrix.to_scipy(), [(1, 9)])[1] == [], "more lanes share a row than a warp has"
        return
    for cut in ((1, 2), (4, 3)):
        assert torch.equal(product(matrix, x, cut), gathered(matrix, x))


@pytest.mark.parametrize("batch", [16, 32, 96])
def test_what_the_op_chooses_for_the_body_mesh(batch: int) -> None:
    """Cuts with 132 multiprocessors' worth of blocks, in both directions; the bits of gathering."""
    matrix = mesh_like_matrix(1723, 431)
    matrix.make_point_tables()
    assert matrix.point_cuts and matrix.t_point_cuts
    x = torch.randn(batch, 431, 3)
    got = upsample(x, *arrays_of(matrix, False), matrix.point_tables, matrix.point_cuts, multiprocessors=132)
    assert torch.equal(got, gathered(matrix, x))
    back = upsample(got, *arrays_of(matrix, True), matrix.t_point_tables, matrix.t_point_cuts, multiprocessors=132)
    assert torch.equal(back, gathered(matrix, got, transposed=True))


def test_impossible_plans_are_refused() -> None:
    matrix = random_matrix(9, 5, 3)
    x = torch.randn(2, 5, 3)
    for other, bytes_read, options in ((x[..., :2], 16, {}), (x, 4, {}), (x, 16, {"shared_limit": 100})):
        with pytest.raises(build.EmulationError, match="no cut of this matrix for such points"):
            product(matrix, other, (1, 3), bytes_read, **options)
    with pytest.raises(build.EmulationError, match="no cut of this matrix for such points"):
        upsample(x, *arrays_of(matrix, False), plan=Plan(POINTS, 4))
