"""SparseMatrix: a constant sparse matrix, validated once, in the layouts that the upsampling kernels read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastmetro_kernels.adjacency import check_compressed, compressed_entries
from fastmetro_kernels.points import build_points

_INT32_MAX = 2**31 - 1
_ELL_MAX_WIDTH = 8
_ELL_MAX_PADDING = 1.25  # slots of the padded table per stored entry
_REMEMBERED = 8  # matrices and transposes whose point tables are kept: a process has many networks of few meshes


class SparseMatrix(nn.Module):
    """A constant M x N matrix of real numbers with few entries, such as one step of a mesh hierarchy.

    The entries are kept row by row (CSR, columns ascending) together with the transpose, which the backward of
    :func:`fastmetro_kernels.sparse_upsample` gathers from. Short rows of (nearly) equal length are also kept as a
    padded table (ELL). Duplicate entries are summed; zeros that the source stores explicitly stay entries, because
    they keep the rows of the published meshes equally long.

    The matrix is data and not a parameter: no gradient flows to it, and all tensors are non-persistent buffers, so
    that they follow ``.to(device)``, ``copy.deepcopy``, ``pickle`` and ``torch.export`` but add nothing to a
    ``state_dict``. ``.half()``, ``.to(torch.bfloat16)`` and the like leave them as they are. Values are kept twice:
    in float32, which float32, float16 and bfloat16 inputs are multiplied by, and in float64 for float64 inputs,
    :meth:`to_scipy` and products of matrices.

    Attributes:
        shape: ``(M, N)``.
        row_offsets: int32 ``[M + 1]``; row i owns the entries ``row_offsets[i]:row_offsets[i + 1]``.
        columns: int32 ``[nnz]``, ascending and without duplicates in each row.
        values: float32 ``[nnz]``.
        values64: float64 ``[nnz]``.
        ell_columns: int32 ``[M, W]`` with -1 in slots that hold no entry, or None where rows are long or uneven.
        ell_values: float32 ``[M, W]`` with 0 in slots that hold no entry, or None.
        point_tables: int32 words, tables of the CUDA kernel for large batches of points (``points.py``). Empty until
            the matrix moves to a CUDA device, because they take up to a second to make, and where the kernel cannot
            take it.
        point_cuts: Sizes of the cuts in ``point_tables``.
        t_row_offsets, t_columns, t_values, t_values64, t_ell_columns, t_ell_values, t_point_tables, t_point_cuts: the
            same of the transpose.

    Args:
        matrix: Any two-dimensional SciPy sparse matrix or array of real numbers.

    Raises:
        TypeError: ``matrix`` is not a SciPy sparse matrix, or its numbers are not real.
        ValueError: it is not two-dimensional, an index is out of range, a value is NaN, infinite or too large for
            float32, or a dimension or the number of entries does not fit in 32 bits.
    """

    row_offsets: Tensor
    columns: Tensor
    values: Tensor
    values64: Tensor
    ell_columns: Tensor | None
    ell_values: Tensor | None
    point_tables: Tensor
    point_cuts: list[int]
    t_row_offsets: Tensor
    t_columns: Tensor
    t_values: Tensor
    t_values64: Tensor
    t_ell_columns: Tensor | None
    t_ell_values: Tensor | None
    t_point_tables: Tensor
    t_point_cuts: list[int]

    def __init__(self, matrix: Any) -> None:
        super().__init__()
        csr = _canonical_csr(matrix)
        self.shape: tuple[int, int] = (int(csr.shape[0]), int(csr.shape[1]))
        self._has_point_tables = False
        self._register_layouts("", csr)
        self._register_layouts("t_", _sorted_csr(csr.T))

    def _register_layouts(self, prefix: str, csr: sp.csr_array) -> None:
        ell_columns, ell_values = _ell_layout(csr)
        setattr(self, prefix + "point_cuts", [])
        layouts = {
            "row_offsets": torch.from_numpy(csr.indptr.astype(np.int32)),
            "columns": torch.from_numpy(csr.indices.astype(np.int32)),
            "values": torch.from_numpy(csr.data.astype(np.float32)),
            "values64": torch.from_numpy(csr.data.astype(np.float64)),
            "ell_columns": ell_columns,
            "ell_values": ell_values,
            "point_tables": torch.zeros(0, dtype=torch.int32),
        }
        for name, tensor in layouts.items():
            self.register_buffer(prefix + name, tensor, persistent=False)

    def make_point_tables(self) -> None:
        """Makes ``point_tables``, on the device of the buffers, if that was not done. Moving to a CUDA device does."""
        if self._has_point_tables:
            return
        csr = self.to_scipy()
        for prefix, matrix in (("", csr), ("t_", _sorted_csr(csr.T))):
            indices = (array.astype(np.int32).tobytes() for array in (matrix.indptr, matrix.indices))
            words, cuts = _point_tables(matrix.shape, *indices, matrix.data.tobytes())
            setattr(self, prefix + "point_cuts", list(cuts))
            self._buffers[prefix + "point_tables"] = torch.from_numpy(words).to(self.columns.device, copy=True)
        self._has_point_tables = True

    @classmethod
    def from_scipy(cls, matrix: Any) -> SparseMatrix:
        """Build from any SciPy sparse matrix or array. See the class for what is accepted and raised."""
        return cls(matrix)

    @classmethod
    def from_dense(cls, matrix: Tensor | np.ndarray) -> SparseMatrix:
        """Build from a dense ``[M, N]`` tensor or array; its zeros are not stored.

        Raises:
            TypeError: ``matrix`` is neither a tensor nor an array, or not real.
            ValueError: it is not two-dimensional, requires grad, or holds NaN or infinity.
        """
        if isinstance(matrix, Tensor):
            if matrix.layout != torch.strided:
                raise TypeError(f"matrix: from_dense takes a dense tensor, got {matrix.layout}; use from_torch")
            matrix = _to_numpy(matrix)
        if not isinstance(matrix, np.ndarray):
            raise TypeError(f"matrix: expected a torch.Tensor or numpy.ndarray, got {type(matrix).__name__}")
        if matrix.ndim != 2:
            raise ValueError(f"matrix: expected 2 dimensions, got shape {tuple(matrix.shape)}")
        _check_real(matrix.dtype)
        return cls(sp.coo_array((matrix[matrix != 0], np.nonzero(matrix)), shape=matrix.shape))

    @classmethod
    def from_torch(cls, matrix: Tensor) -> SparseMatrix:
        """Build from a torch tensor: COO, CSR, CSC or dense.

        Raises:
            TypeError: ``matrix`` is not a tensor, not real, or of another layout.
            ValueError: it is not two-dimensional, requires grad, has an index out of range or broken offsets, or holds
                NaN or infinity.
        """
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix: expected a torch.Tensor, got {type(matrix).__name__}")
        if matrix.layout == torch.strided:
            return cls.from_dense(matrix)
        if matrix.ndim != 2:
            raise ValueError(f"matrix: expected 2 dimensions, got shape {tuple(matrix.shape)}")
        shape = (matrix.shape[0], matrix.shape[1])
        if matrix.layout == torch.sparse_coo:
            rows, columns = _to_numpy(matrix._indices())
            return cls(_triplets_to_coo(rows, columns, _to_numpy(matrix._values(), matrix), shape))
        if matrix.layout not in (torch.sparse_csr, torch.sparse_csc):
            raise TypeError(f"matrix: expected a COO, CSR, CSC or dense tensor, got layout {matrix.layout}")
        rows, columns = compressed_entries("matrix", matrix)
        return cls(_triplets_to_coo(rows, columns, _to_numpy(matrix.values(), matrix), shape))

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.columns.numel()

    def to_scipy(self) -> sp.csr_array:
        """The matrix as a float64 SciPy CSR array in host memory."""
        arrays = (self.values64, self.columns, self.row_offsets)
        return sp.csr_array(tuple(a.cpu().numpy().copy() for a in arrays), shape=self.shape)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as a dense ``[M, N]`` tensor of ``dtype`` on the device of the buffers."""
        lengths = self.row_offsets.diff()
        rows = torch.repeat_interleave(torch.arange(self.shape[0], device=lengths.device), lengths)
        dense = torch.zeros(self.shape, dtype=dtype, device=lengths.device)
        dense[rows, self.columns.long()] = self.values64.to(dtype)
        return dense

    def transpose(self) -> SparseMatrix:
        """The N x M transpose, on the same device."""
        return SparseMatrix(self.to_scipy().T).to(self.columns.device)

    def __matmul__(self, other: SparseMatrix) -> SparseMatrix:
        """The matrix product, computed in float64 on the host; ``(a @ b)`` upsamples by ``b`` first, then by ``a``.

        Raises:
            ValueError: the inner dimensions differ.
        """
        if not isinstance(other, SparseMatrix):
            return NotImplemented
        if self.shape[1] != other.shape[0]:
            raise ValueError(f"other: a matrix of shape {self.shape} cannot be multiplied with one of {other.shape}")
        return SparseMatrix(self.to_scipy() @ other.to_scipy()).to(self.columns.device)

    def extra_repr(self) -> str:
        """Shape, entries and layout, for ``print``."""
        layout = "CSR" if self.ell_columns is None else f"ELL of width {self.ell_columns.shape[1]}"
        return f"{self.shape[0]} x {self.shape[1]}, {self.nnz} entries, {layout}, {self.columns.device}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseMatrix:
        # Follows devices but not dtypes: a model cast to half precision keeps its matrices exact.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        if self.columns.is_cuda:
            self.make_point_tables()
        return self


def _canonical_csr(matrix: Any) -> sp.csr_array:
    """Check everything that is promised about a matrix; return float64 CSR, sorted, with duplicates summed."""
    if not sp.issparse(matrix):
        raise TypeError(
            f"matrix: expected a scipy.sparse matrix or array, got {type(matrix).__name__}; "
            "see also SparseMatrix.from_dense and SparseMatrix.from_torch"
        )
    if matrix.ndim != 2:
        raise ValueError(f"matrix: expected 2 dimensions, got shape {tuple(matrix.shape)}")
    _check_real(matrix.dtype)
    check_compressed("matrix", matrix)
    coo = sp.coo_array(matrix)
    for name, index, size in (("row", coo.row, coo.shape[0]), ("column", coo.col, coo.shape[1])):
        if size > _INT32_MAX:
            raise ValueError(f"matrix: at most {_INT32_MAX} {name}s are supported, got {size}")
        if index.size and (index.min() < 0 or index.max() >= size):
            raise ValueError(f"matrix: {name} indices must be in [0, {size}), got {index.min()} ... {index.max()}")
    if coo.data.size > _INT32_MAX:
        raise ValueError(f"matrix: at most {_INT32_MAX} entries are supported, got {coo.data.size}")
    csr = _sorted_csr(sp.coo_array((coo.data.astype(np.float64), (coo.row, coo.col)), shape=coo.shape))
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(csr.data.astype(np.float32))
    if bad.any():
        raise ValueError(
            f"matrix: values must be finite in float32, got {csr.data[bad][0]} "
            f"({int(bad.sum())} of {bad.size} values are not)"
        )
    return csr


def _sorted_csr(matrix: Any) -> sp.csr_array:
    csr = sp.csr_array(matrix)
    csr.sum_duplicates()
    csr.sort_indices()
    return csr


@functools.lru_cache(maxsize=_REMEMBERED)
def _point_tables(
    shape: tuple[int, int], offsets: bytes, columns: bytes, values: bytes
) -> tuple[np.ndarray, list[int]]:
    """`build_points` of a CSR matrix, whose arrays are int32, int32 and float64; shared, so only read the result."""
    arrays = (np.frombuffer(values), np.frombuffer(columns, np.int32), np.frombuffer(offsets, np.int32))
    return build_points(sp.csr_array(arrays, shape=shape))


def _ell_layout(csr: sp.csr_array) -> tuple[Tensor | None, Tensor | None]:
    """The padded table of a matrix whose rows are short and nearly equal, else (None, None)."""
    lengths = np.diff(csr.indptr)
    width = int(lengths.max(initial=0))
    if not 0 < width <= _ELL_MAX_WIDTH or width * csr.shape[0] > _ELL_MAX_PADDING * csr.nnz:
        return None, None
    filled = np.arange(width)[None, :] < lengths[:, None]
    columns = np.full((csr.shape[0], width), -1, dtype=np.int32)
    values = np.zeros((csr.shape[0], width), dtype=np.float32)
    columns[filled] = csr.indices
    values[filled] = csr.data
    return torch.from_numpy(columns), torch.from_numpy(values)


def _check_real(dtype: np.dtype) -> None:
    if dtype.kind not in "fiub":
        raise TypeError(f"matrix: expected real numbers, got dtype {dtype}")


def _to_numpy(tensor: Tensor, owner: Tensor | None = None) -> np.ndarray:
    if tensor.requires_grad or (owner is not None and owner.requires_grad):
        raise ValueError("matrix: values are constants and get no gradient; pass matrix.detach()")
    tensor = tensor.cpu()
    return (tensor.double() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _triplets_to_coo(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sp.coo_array:
    """A COO array from triplets that nobody has checked: SciPy refuses indices out of range with a ValueError."""
    try:
        return sp.coo_array((values, (rows, columns)), shape=shape)
    except ValueError as error:
        raise ValueError(f"matrix: {error}") from error
