"""The CUDA kernels of sparse_upsample, compiled as host code: every kernel, every way the work can be cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import build
from emulation.upsampling import GATHER, KIB, STAGED, Plan, upsample
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

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))

GATHERS = [Plan(GATHER, tile, threads) for tile in (1, 4, 8) for threads in (0, 64, 128)]
STAGED_PLANS = {
    dtype: [Plan(STAGED, word * tile, threads) for tile in (1, 2, 4) for threads in (64, 256)]
    for dtype, word in ((FLOAT, 1), (HALF, 2))
}


def product(matrix: SparseMatrix, x: Tensor, transposed: bool = False, **options: object) -> Tensor:
    m = matrix
    arrays = (m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.shape[0], m.point_tables, m.point_cuts)
    if transposed:
        arrays = (
            *(m.t_row_offsets, m.t_columns, m.t_values, m.t_ell_columns, m.t_ell_values),
            *(m.shape[1], m.t_point_tables, m.t_point_cuts),
        )
    return upsample(x, *arrays, **options)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_configuration_gives_the_same_right_bits(shape: str, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("batch", [1, 32, 96])
def test_sizes_of_the_body_mesh(batch: int) -> None:
    """As on an H200: spread evenly, and by the kernel for points where the batch is large."""
    matrix = mesh_like_matrix(1723, 431)
    matrix.make_point_tables()
    assert matrix.point_cuts and matrix.t_point_cuts
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
