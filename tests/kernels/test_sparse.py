"""SparseMatrix: what is accepted, what is refused, and that nothing about the matrix is lost on the way."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmetro.meshes.unpickle import read_object_npz
from fastmetro_kernels.sparse import SparseMatrix

BUFFERS = ("row_offsets", "columns", "values", "values64", "ell_columns", "ell_values")


def random_csr(rows: int, columns: int, density: float, seed: int) -> sp.csr_array:
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < density)
    return sp.csr_array(dense)


def check_against(matrix: SparseMatrix, dense: np.ndarray) -> None:
    """Every layout of ``matrix`` must say the same as ``dense``."""
    assert matrix.shape == dense.shape
    np.testing.assert_array_equal(matrix.to_scipy().toarray(), dense)
    np.testing.assert_array_equal(matrix.to_dense(torch.float64).numpy(), dense)
    for prefix, expected in (("", dense), ("t_", dense.T)):
        get = {name: getattr(matrix, prefix + name) for name in BUFFERS}
        assert get["row_offsets"].dtype == get["columns"].dtype == torch.int32
        assert get["values"].dtype == torch.float32 and get["values64"].dtype == torch.float64
        arrays = tuple(get[name].numpy() for name in ("values64", "columns", "row_offsets"))
        csr = sp.csr_array(arrays, shape=expected.shape)
        csr.check_format(full_check=True)
        assert csr.has_canonical_format
        np.testing.assert_array_equal(csr.toarray(), expected)
        np.testing.assert_array_equal(get["values"].numpy(), arrays[0].astype(np.float32))
        if get["ell_columns"] is not None:
            table = np.zeros(expected.shape, dtype=np.float32)
            row, slot = np.nonzero(get["ell_columns"].numpy() >= 0)
            table[row, get["ell_columns"].numpy()[row, slot]] = get["ell_values"].numpy()[row, slot]
            np.testing.assert_array_equal(table, expected.astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_every_source_gives_the_same_matrix(rows: int, columns: int, density: float, seed: int, even: bool) -> None:
    csr = random_csr(rows, columns, 1.0 if even else density, seed)
    dense = csr.toarray()
    tensor = torch.from_numpy(dense)
    sources = [
        SparseMatrix.from_scipy(csr),
        SparseMatrix.from_scipy(sp.csc_matrix(csr)),
        SparseMatrix.from_scipy(sp.coo_array(csr)),
        SparseMatrix.from_scipy(sp.lil_array(csr)),
        SparseMatrix.from_dense(dense),
        SparseMatrix.from_dense(tensor),
        SparseMatrix.from_torch(tensor),
        SparseMatrix.from_torch(tensor.to_sparse_coo()),
    ]
    if rows and columns:  # torch's own conversions of empty compressed tensors are not under test
        sources += [SparseMatrix.from_torch(tensor.to_sparse_csr()), SparseMatrix.from_torch(tensor.to_sparse_csc())]
    for matrix in sources:
        check_against(matrix, dense)
    check_against(sources[0].transpose(), dense.T)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**31))
def test_product_of_matrices(rows: int, inner: int, columns: int, seed: int) -> None:
    a, b = random_csr(rows, inner, 0.5, seed), random_csr(inner, columns, 0.5, seed + 1)
    product = SparseMatrix.from_scipy(a) @ SparseMatrix.from_scipy(b)
    np.testing.assert_allclose(product.to_scipy().toarray(), a.toarray() @ b.toarray(), rtol=1e-12, atol=1e-12)


def test_duplicates_are_summed_and_stored_zeros_stay() -> None:
    coo = sp.coo_array(([1.0, 2.0, 0.0, 5.0], ([0, 0, 1, 1], [1, 1, 0, 2])), shape=(2, 3))
    matrix = SparseMatrix.from_scipy(coo)
    assert matrix.nnz == 3
    assert matrix.columns.tolist() == [1, 0, 2] and matrix.values.tolist() == [3.0, 0.0, 5.0]
    assert coo.nnz == 4  # the source is left alone


def test_unsorted_input_is_not_modified() -> None:
    csr = sp.csr_array((np.array([1.0, 2.0]), np.array([2, 0]), np.array([0, 2])), shape=(1, 3))
    matrix = SparseMatrix.from_scipy(csr)
    assert matrix.columns.tolist() == [0, 2] and matrix.values.tolist() == [2.0, 1.0]
    assert csr.indices.tolist() == [2, 0]


def test_padded_table_only_for_short_even_rows() -> None:
    def table(lengths: list[int], columns: int = 20) -> torch.Tensor | None:
        row = np.repeat(np.arange(len(lengths)), lengths)
        column = np.concatenate([np.arange(n) for n in lengths])
        return SparseMatrix(sp.coo_array((np.ones(row.size), (row, column)), (len(lengths), columns))).ell_columns

    assert table([3] * 8).shape == (8, 3)
    padded = table([3, 3, 2, 3, 3, 3, 3, 3])
    assert padded.shape == (8, 3) and padded[2].tolist() == [0, 1, -1]
    assert table([8] * 4).shape == (4, 8)
    assert table([9] * 4) is None  # long
    assert table([1, 1, 1, 8]) is None  # uneven
    assert table([0, 0]) is None


def test_follows_devices_and_copies_but_not_dtypes(device: torch.device) -> None:
    source = random_csr(7, 5, 0.5, 0)
    dense = source.toarray()
    matrix = SparseMatrix.from_scipy(source).to(device)
    assert all(buffer.device.type == device.type for buffer in matrix.buffers())
    for other in (
        copy.deepcopy(matrix),
        pickle.loads(pickle.dumps(matrix)),
        matrix.to(torch.float16),
        matrix.bfloat16(),
        matrix.double(),
        torch.nn.Sequential(matrix).half()[0],
        matrix.cpu(),
    ):
        check_against(other.cpu(), dense)
    assert list(matrix.state_dict()) == [] and list(matrix.parameters()) == []
    on_device = SparseMatrix.from_scipy(source).to(device)
    assert on_device.transpose().values.device.type == device.type
    assert (on_device @ on_device.transpose()).values.device.type == device.type


def test_survives_torch_save_of_a_module() -> None:
    matrix = SparseMatrix.from_scipy(random_csr(7, 5, 0.5, 0))
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(matrix), file)
    file.seek(0)
    check_against(torch.load(file, weights_only=False)[0], matrix.to_scipy().toarray())


def test_tables_of_the_points_kernel_are_made_on_demand() -> None:
    """Not at construction, where nobody may need them; once; and copies and pickles keep them."""
    step = sp.csr_array(np.eye(400)[np.arange(1200) % 400])
    matrix = SparseMatrix.from_scipy(step)
    assert matrix.point_cuts == [] and matrix.point_tables.numel() == 0
    matrix.make_point_tables()
    tables = matrix.point_tables
    matrix.make_point_tables()
    assert matrix.point_tables is tables
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix)), matrix.half()):
        assert torch.equal(other.point_tables, tables) and other.point_cuts == matrix.point_cuts
    assert matrix.t_point_cuts and matrix.t_point_tables.dtype == torch.int32


def test_point_tables_are_made_once_for_equal_matrices_and_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the slowest part of a network on a GPU, and whoever compares networks has many with one mesh."""
    step = sp.csr_array(np.eye(400)[np.arange(1300) % 400])
    first = SparseMatrix.from_scipy(step)
    first.make_point_tables()
    kept = first.point_tables.clone()
    first.point_tables.zero_()
    first.point_cuts.clear()
    monkeypatch.setattr("fastmetro_kernels.sparse.build_points", lambda csr: pytest.fail("made again"))
    second = SparseMatrix.from_scipy(step)
    second.make_point_tables()
    assert torch.equal(second.point_tables, kept) and second.point_cuts
    monkeypatch.setattr("fastmetro_kernels.sparse.build_points", lambda csr: (np.ones(1, np.int32), [7]))
    other = SparseMatrix.from_scipy(2.0 * step)
    other.make_point_tables()
    assert other.point_cuts == [7], "other values are another matrix"


def test_repr_names_shape_entries_and_layout() -> None:
    matrix = SparseMatrix.from_dense(np.ones((4, 3)))
    assert repr(matrix) == "SparseMatrix(4 x 3, 12 entries, ELL of width 3, cpu)"


def malformed_csr() -> sp.csr_array:
    matrix = sp.csr_array(np.ones((2, 3)))
    matrix.indices[1] = 7
    return matrix


def malformed_compressed(layout: torch.layout) -> torch.Tensor:
    offsets, indices = torch.tensor([0, 3, 2]), torch.tensor([0, 1])
    return torch.sparse_compressed_tensor(
        offsets, indices, torch.ones(2), (2, 2), layout=layout, check_invariants=False
    )  # fmt: skip


def out_of_range_coo() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0], [9]]), torch.ones(1), (2, 3), check_invariants=False)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SparseMatrix(np.ones((2, 2))), TypeError, "expected a scipy.sparse matrix .*ndarray.*from_dense"),
        (lambda: SparseMatrix.from_dense([[1.0]]), TypeError, "expected a torch.Tensor or numpy.ndarray, got list"),
        (lambda: SparseMatrix.from_torch(np.ones((2, 2))), TypeError, "expected a torch.Tensor, got ndarray"),
        (lambda: SparseMatrix.from_dense(np.ones(3)), ValueError, r"expected 2 dimensions, got shape \(3,\)"),
        (lambda: SparseMatrix.from_dense(np.ones((2, 2, 2))), ValueError, "expected 2 dimensions"),
        (lambda: SparseMatrix.from_torch(torch.ones(2, 2, 2).to_sparse_coo()), ValueError, "expected 2 dimensions"),
        (lambda: SparseMatrix(sp.coo_array(np.ones(3))), ValueError, "expected 2 dimensions"),
        (lambda: SparseMatrix.from_dense(np.ones((2, 2), complex)), TypeError, "real numbers, got dtype complex"),
        (lambda: SparseMatrix.from_dense(torch.eye(2).to_sparse_coo()), TypeError, "takes a dense tensor"),
        (lambda: SparseMatrix.from_dense(np.array([[1.0, np.nan]])), ValueError, "finite in float32, got nan"),
        (lambda: SparseMatrix.from_dense(np.array([[1.0, -np.inf]])), ValueError, "finite in float32, got -inf"),
        (lambda: SparseMatrix.from_dense(np.array([[1e300]])), ValueError, r"finite in float32, got 1e\+300"),
        (lambda: SparseMatrix(malformed_csr()), ValueError, "malformed CSR"),
        (lambda: SparseMatrix.from_torch(out_of_range_coo()), ValueError, "exceeds|range|index"),
        (lambda: SparseMatrix.from_torch(malformed_compressed(torch.sparse_csr)), ValueError, "rise from 0 to 2"),
        (lambda: SparseMatrix.from_torch(malformed_compressed(torch.sparse_csc)), ValueError, "rise from 0 to 2"),
        (lambda: SparseMatrix.from_torch(torch.eye(2).to_sparse_bsr((1, 1))), TypeError, "got layout .*bsr"),
        (lambda: SparseMatrix(sp.coo_array((2**31, 1))), ValueError, "at most 2147483647 rows"),
        (lambda: SparseMatrix(sp.coo_array((1, 2**31))), ValueError, "at most 2147483647 columns"),
        (lambda: SparseMatrix.from_dense(torch.ones(2, 2, requires_grad=True)), ValueError, "detach"),
        (lambda: SparseMatrix.from_torch(torch.eye(2).to_sparse_coo().requires_grad_()), ValueError, "detach"),
        (lambda: SparseMatrix.from_torch(torch.eye(2).to_sparse_csr().requires_grad_()), ValueError, "detach"),
        (
            lambda: SparseMatrix.from_dense(np.ones((2, 3))) @ SparseMatrix.from_dense(np.ones((2, 3))),
            ValueError,
            r"\(2, 3\) cannot be multiplied with one of \(2, 3\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_wrong_input_is_refused(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_published_matrices(shared: Path) -> None:
    path = shared / "data" / "fastmetro" / "mesh_downsampling.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    steps = read_object_npz(path, ["U"])["U"]
    fine, coarse = SparseMatrix.from_scipy(steps[0]), SparseMatrix.from_scipy(steps[1])
    assert fine.shape == (6890, 1723) and fine.nnz == 20670 and fine.ell_columns.shape == (6890, 3)
    assert coarse.shape == (1723, 431) and coarse.nnz == 5169 and coarse.ell_columns.shape == (1723, 3)
    assert fine.t_ell_columns is None
    product = fine @ coarse
    assert product.shape == (6890, 431) and product.nnz == 31765 and product.ell_columns is None
