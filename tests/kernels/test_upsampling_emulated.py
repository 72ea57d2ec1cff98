"""The CUDA kernels of sparse_upsample, compiled as host code: every kernel, every way the work can be cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import build
from emulation.upsampling import BULK, GATHER, KIB, STAGED, STREAM, Plan, upsample
from test_upsampling import (
    FLOAT,
    HALF,
    SHAPES,
    check_product,
    mesh_like_matrix,
    random_input,
    random_matrix,
    strided_inputs,
)
from torch import Tensor

from fastmetro_kernels import SparseMatrix
from fastmetro_kernels.bulk import build_bulk
from fastmetro_kernels.streams import build_streams

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))

GATHERS = [Plan(GATHER, tile, threads) for tile in (1, 4, 8) for threads in (0, 64, 128)]
STAGED_PLANS = {
    dtype: [Plan(STAGED, word * tile, threads) for tile in (1, 2, 4) for threads in (64, 256)]
    for dtype, word in ((FLOAT, 1), (HALF, 2))
}


def product(matrix: SparseMatrix, x: Tensor, transposed: bool = False, **options: object) -> Tensor:
    m = matrix
    arrays = (m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.shape[0], m.streams, m.stream_sizes)
    if transposed:
        arrays = (
            *(m.t_row_offsets, m.t_columns, m.t_values, m.t_ell_columns, m.t_ell_values),
            *(m.shape[1], m.t_streams, m.t_stream_sizes),
        )
    return upsample(x, *arrays, **options)


def streamed(
    matrix: SparseMatrix, x: Tensor, cut: tuple[int, int], transposed: bool = False, **options: object
) -> Tensor:
    """The product by the streaming or the bulk kernel; skips where there is no such cut (blocks, warps of a block)."""
    m = matrix.to_scipy()
    plan = options["plan"]
    build = build_bulk if isinstance(plan, Plan) and plan.kernel == BULK else build_streams
    words, sizes = build(m.T.tocsr() if transposed else m, [cut])
    if not sizes:
        pytest.skip("the rows do not fit the registers of so few blocks")
    arrays = (matrix.row_offsets, matrix.columns, matrix.values, matrix.ell_columns, matrix.ell_values)
    if transposed:
        arrays = (matrix.t_row_offsets, matrix.t_columns, matrix.t_values, matrix.t_ell_columns, matrix.t_ell_values)
    return upsample(x, *arrays, m.shape[1 if transposed else 0], torch.from_numpy(words), sizes, **options)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_configuration_gives_the_same_right_bits(shape: str, dtype: torch.dtype) -> None:
    """The op's own choice is right too; bulk copies, which it may take, have other bits."""
    matrix, sizes = SHAPES[shape]
    for batch, channels in sizes:
        x = random_input(matrix, batch, channels, dtype, "cpu")
        grad = torch.randn(batch, matrix.shape[0], channels, generator=torch.Generator().manual_seed(1)).to(dtype)
        for transposed, source in ((False, x), (True, grad)):
            check_product(product(matrix, source, transposed), matrix, source, transposed)
            expected = product(matrix, source, transposed, plan=GATHERS[0])
            check_product(expected, matrix, source, transposed)
            fitting = [p for p in STAGED_PLANS[dtype] if source[0].nbytes * p.batch_tile <= 227 * KIB]
            for plan in GATHERS + fitting:
                assert torch.equal(product(matrix, source, transposed, plan=plan), expected), plan


@pytest.mark.parametrize("lengths", [1, 3, 5, 6, 12, (0, 33), 40, (30, 90)])
def test_rows_of_every_length(lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(23, 97, lengths)
    for batch in (1, 3, 9):
        x = random_input(matrix, batch, 3, FLOAT, "cpu")
        expected = product(matrix, x)
        check_product(expected, matrix, x)
        for plan in [*GATHERS[::4], *STAGED_PLANS[FLOAT][::3]]:
            assert torch.equal(product(matrix, x, plan=plan), expected)
        # What one sample gives does not depend on the others.
        assert torch.equal(product(matrix, x[:1]), expected[:1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize(("lengths", "cut"), [
    (3, (1, 3)), (3, (2, 3)), (3, (3, 6)), ((0, 5), (2, 3)), ((1, 9), (3, 9)), ((0, 30), (3, 6)), (40, (4, 9)),
])  # fmt: skip
def test_streams(lengths: int | tuple[int, int], cut: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
    """The same bits as gathering gives, whatever share of the batch a block gets."""
    matrix = random_matrix(131, 61, lengths)
    for batch in (1, 2, 5, 8):
        x = torch.randn(batch, matrix.shape[0 if transposed else 1], 3).to(dtype)
        expected = product(matrix, x, transposed, plan=Plan(GATHER, 4))
        check_product(expected, matrix, x, transposed)
        for tile in {4 // dtype.itemsize, 2}:
            for multiprocessors in (1, 4, 100):
                options = {"plan": Plan(STREAM, tile), "multiprocessors": multiprocessors}
                assert torch.equal(streamed(matrix, x, cut, transposed, **options), expected)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
@pytest.mark.parametrize("transposed", [False, True])
def test_streams_in_any_order_of_threads(schedule: str, transposed: bool) -> None:
    matrix = random_matrix(131, 61, 3)
    x = torch.randn(7, matrix.shape[0 if transposed else 1], 3)
    for tile in (1, 2):
        expected = streamed(matrix, x, (2, 3), transposed, plan=Plan(STREAM, tile))
        got = streamed(matrix, x, (2, 3), transposed, plan=Plan(STREAM, tile), schedule=schedule)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("lengths", [3, (0, 9)])
def test_streams_of_strided_inputs(lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(131, 61, lengths)
    for name, x in strided_inputs(matrix.shape[1], 3, "cpu").items():
        expected = product(matrix, x.contiguous(), plan=Plan(GATHER, 1))
        assert torch.equal(streamed(matrix, x, (3, 3), plan=Plan(STREAM, 2)), expected), name


@pytest.mark.parametrize("lengths", [3, (0, 9)])
def test_streams_keep_nan_where_it_belongs(lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(131, 61, lengths)
    x = torch.randn(5, 61, 3)
    x[1, 7] = torch.nan
    hit = torch.zeros(5, 131, 3, dtype=torch.bool)
    hit[1] = (matrix.to_dense()[:, 7] != 0)[:, None]
    assert torch.equal(streamed(matrix, x, (3, 3), plan=Plan(STREAM, 1)).isnan(), hit)


BULK_CASES = [(3, (1, 3)), (3, (3, 6)), ((0, 5), (2, 3)), ((1, 9), (3, 8)), ((0, 30), (3, 6)), (40, (4, 9))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize(("lengths", "cut"), BULK_CASES)
def test_bulk(lengths: int | tuple[int, int], cut: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
    """Right, and the same bits whatever share of the batch a block gets, and however many elements are under way."""
    matrix = random_matrix(131, 61, lengths)
    for batch in (1, 2, 7):
        x = torch.randn(batch, matrix.shape[0 if transposed else 1], 3).to(dtype)
        expected = None
        for stages, multiprocessors in ((2, 1), (3, 1), (4, 100)):
            options = {"plan": Plan(BULK, stages), "multiprocessors": multiprocessors}
            got = streamed(matrix, x, cut, transposed, **options)
            check_product(got, matrix, x, transposed)
            assert expected is None or torch.equal(got, expected)
            expected = got


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 64])
def test_bulk_of_points_that_begin_anywhere(tokens: int, dtype: torch.dtype) -> None:
    """Elements and rows of every size at every distance from a multiple of 16 bytes; storage ends with x."""
    matrix = random_matrix(17, tokens, (0, min(tokens, 4)))
    for start in range(16 // dtype.itemsize):
        for gap in (0, 1, 7):
            size = 3 * tokens
            storage = torch.full((start + 4 * (size + gap) + size,), torch.nan, dtype=dtype)
            x = storage.as_strided((5, tokens, 3), (size + gap, 3, 1), start)
            x.copy_(torch.randn(x.shape))
            check_product(streamed(matrix, x, (2, 2), plan=Plan(BULK, 2)), matrix, x)
            again = x.flip(0).contiguous()[:1].expand(3, -1, -1)  # one element, again and again
            check_product(streamed(matrix, again, (1, 1), plan=Plan(BULK, 2)), matrix, again)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
@pytest.mark.parametrize("transposed", [False, True])
def test_bulk_in_any_order_of_threads(schedule: str, transposed: bool) -> None:
    matrix = random_matrix(131, 61, 3)
    for dtype in (FLOAT, HALF):
        x = torch.randn(7, matrix.shape[0 if transposed else 1], 3).to(dtype)
        options = {"plan": Plan(BULK, 2), "multiprocessors": 2}
        expected = streamed(matrix, x, (2, 3), transposed, **options)
        assert torch.equal(streamed(matrix, x, (2, 3), transposed, schedule=schedule, **options), expected)


@pytest.mark.parametrize("lengths", [3, (0, 9)])
def test_bulk_keeps_nan_where_it_belongs(lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(131, 61, lengths)
    for token in (0, 7, 60):
        x = torch.randn(5, 61, 3)
        x[1, token] = torch.nan
        hit = torch.zeros(5, 131, 3, dtype=torch.bool)
        hit[1] = (matrix.to_dense()[:, token] != 0)[:, None]
        assert torch.equal(streamed(matrix, x, (3, 3), plan=Plan(BULK, 2)).isnan(), hit)


@pytest.mark.parametrize("batch", [1, 32, 96])
def test_sizes_of_the_body_mesh(batch: int) -> None:
    """As on an H200: spread evenly, and streamed where the batch is large."""
    matrix = mesh_like_matrix(1723, 431)
    assert matrix.stream_sizes and matrix.t_stream_sizes
    x = random_input(matrix, batch, 3, FLOAT, "cpu")
    out = product(matrix, x, multiprocessors=132)
    check_product(out, matrix, x)
    check_product(product(matrix, out, transposed=True, multiprocessors=132), matrix, out, transposed=True)


@pytest.mark.parametrize("shape", ["three-per-row", "uneven"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_strides_and_exact_bounds(shape: str, dtype: torch.dtype) -> None:
    matrix = SHAPES[shape][0]
    for channels in (3, 16):
        for name, x in strided_inputs(matrix.shape[1], channels, "cpu").items():
            x = x.to(dtype, memory_format=torch.preserve_format)
            expected = product(matrix, x.contiguous())
            check_product(expected, matrix, x)
            for plan in (None, Plan(GATHER, 8)):
                assert torch.equal(product(matrix, x, plan=plan), expected), name


@pytest.mark.parametrize("shape", ["three-per-row", "uneven", "long"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_any_order_of_threads_gives_the_same_bits(shape: str, schedule: str) -> None:
    matrix = SHAPES[shape][0]
    x = random_input(matrix, 5, 3, FLOAT, "cpu")
    for plan in (Plan(GATHER, 4), Plan(GATHER, 8), Plan(STAGED, 2), Plan(STAGED, 4)):
        expected = product(matrix, x, plan=plan)
        assert torch.equal(product(matrix, x, plan=plan, schedule=schedule), expected)


def test_far_offsets_within_one_sample() -> None:
    storage = torch.empty(2**31 + 4096, dtype=HALF)  # almost all of it is never touched
    for lengths in (3, 6, 12, 40):
        matrix = random_matrix(9, 5 if lengths < 6 else 50, lengths)
        step = 2**31 // (matrix.shape[1] - 1) + 1
        for strides in ((0, step, 1), (0, 3, 2**30)):
            x = storage.as_strided((2, matrix.shape[1], 3), strides)
            x[0] = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
            got = product(matrix, x)
            check_product(got, matrix, x)
            assert torch.equal(got, product(matrix, x.contiguous()))


def test_more_batch_elements_than_one_launch_takes() -> None:
    matrix = random_matrix(2, 2, 1)
    x = random_input(matrix, 1, 1, FLOAT, "cpu").expand(66_000, -1, -1).contiguous()
    x *= torch.arange(len(x), dtype=FLOAT)[:, None, None] % 7
    check_product(product(matrix, x, plan=Plan(GATHER, 1, 32)), matrix, x)


def test_any_device_gives_the_same_bits() -> None:
    """The op's own choice at every batch size around its limits, on devices of different sizes."""
    matrix = random_matrix(40, 30, 3)
    for batch in (1, 2, 15, 16, 17, 40):
        for dtype in (FLOAT, HALF):
            x = random_input(matrix, batch, 3, dtype, "cpu")
            expected = product(matrix, x, multiprocessors=132)
            check_product(expected, matrix, x)
            for multiprocessors, shared_limit in ((1, 300), (3, 700), (8, 1500)):
                options = {"multiprocessors": multiprocessors, "shared_limit": shared_limit}
                assert torch.equal(product(matrix, x, **options), expected)


def test_nan_stays_in_rows_that_name_it() -> None:
    for shape in ("three-per-row", "uneven", "long"):
        matrix = SHAPES[shape][0]
        x = random_input(matrix, 3, 3, FLOAT, "cpu")
        x[1, 0] = torch.nan
        hit = torch.zeros(3, matrix.shape[0], 3, dtype=torch.bool)
        hit[1] = torch.from_numpy(np.asarray(matrix.to_dense()[:, 0] != 0))[:, None]
        for plan in (Plan(GATHER, 1), Plan(GATHER, 8), Plan(STAGED, 4)):
            assert torch.equal(product(matrix, x, plan=plan).isnan(), hit)


def test_impossible_plans_are_refused() -> None:
    matrix = random_matrix(9, 5, 3)
    x = random_input(matrix, 2, 3, FLOAT, "cpu")
    with pytest.raises(build.EmulationError, match="no kernel for tiles of so many"):
        product(matrix, x, plan=Plan(GATHER, 3))
    with pytest.raises(build.EmulationError, match="no kernel for tiles of so many"):
        product(matrix, x, plan=Plan(STAGED, 8))
    with pytest.raises(build.EmulationError, match="does not fit in shared memory"):
        product(matrix, x, plan=Plan(STAGED, 4), shared_limit=100)
    with pytest.raises(build.EmulationError, match="does not fit in shared memory"):
        product(matrix, x[..., :2], plan=Plan(STAGED, 4))
    with pytest.raises(build.EmulationError, match="cannot be streamed"):
        product(matrix, x, plan=Plan(STREAM, 1))
    for other, options in ((x[..., :2], {}), (x, {"shared_limit": 100})):
        with pytest.raises(build.EmulationError, match="cannot be streamed"):
            streamed(matrix, other, (1, 3), plan=Plan(STREAM, 1), **options)
    with pytest.raises(build.EmulationError, match="no kernel for tiles of so many"):
        streamed(matrix, x, (1, 3), plan=Plan(STREAM, 3))
    wide = torch.randn(2, 5, 4)
    for other, options in ((wide[..., :3], {}), (wide[..., :2], {}), (x, {"shared_limit": 100})):
        with pytest.raises(build.EmulationError, match="cannot be copied in bulk"):
            streamed(matrix, other, (1, 3), plan=Plan(BULK, 2), **options)
    for stages in (1, 5):
        with pytest.raises(build.EmulationError, match="cannot be copied in bulk"):
            streamed(matrix, x, (1, 3), plan=Plan(BULK, stages))
