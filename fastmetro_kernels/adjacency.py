"""Neighbour lists from faces, edges, matrices and masks: all the checking that `TokenTopology` does.

Every function returns `(row_offsets [N + 1], columns [nnz])` as int64 NumPy arrays, sorted, without duplicates, or
raises an error that names the argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch

MAX_HUBS = 64
"""Most hub tokens a topology may have (the kernels keep all hub keys of a row on chip)."""

MAX_ENTRIES = 2**31 - 1
"""Most neighbour entries: offsets are int32."""

Lists = tuple[np.ndarray, np.ndarray]


def check_num_hubs(num_hubs: Any) -> int:
    """Returns `num_hubs` as an int, or raises when it is not one of 0 to 64."""
    if isinstance(num_hubs, bool) or not isinstance(num_hubs, (int, np.integer)):
        raise TypeError(f"num_hubs must be an int, got {type(num_hubs).__name__}")
    if not 0 <= num_hubs <= MAX_HUBS:
        raise ValueError(f"num_hubs must be 0 to {MAX_HUBS}, got {num_hubs}")
    return int(num_hubs)


def check_entry_count(count: int) -> None:
    """Raises when `count` neighbour entries do not fit int32 offsets."""
    if count > MAX_ENTRIES:
        raise ValueError(f"the topology has {count} neighbour entries, at most {MAX_ENTRIES} are supported")


def check_symmetric(row_offsets: np.ndarray, columns: np.ndarray) -> tuple[int, int] | None:
    """The first pair (i, j) where i may attend to j and j not to i; None when the lists are symmetric."""
    count = len(row_offsets) - 1
    rows = np.repeat(np.arange(count, dtype=np.int64), np.diff(row_offsets))
    forward = rows * count + columns
    missing = np.setdiff1d(forward, columns * count + rows, assume_unique=True)
    if len(missing) == 0:
        return None
    return int(missing[0] // count), int(missing[0] % count)


def as_numpy(name: str, value: Any) -> np.ndarray:
    """`value` (array, tensor on any device, nested list) as a NumPy array."""
    if isinstance(value, torch.Tensor):
        try:
            return value.detach().cpu().numpy()
        except TypeError as error:  # NumPy has no sparse layouts and no bfloat16
            raise TypeError(f"{name} cannot be a {value.layout} tensor of {value.dtype}: {error}") from error
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array: {error}") from error


def check_compressed(name: str, matrix: Any) -> None:
    """Raises when the arrays of a SciPy CSR, CSC or BSR matrix contradict each other: converting reads beyond them."""
    if matrix.format in ("csr", "csc", "bsr"):
        try:
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise ValueError(f"{name}: malformed {matrix.format.upper()} arrays: {error}") from error


def compressed_entries(name: str, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries of a CSR or CSC tensor [M, N], which nobody need have checked.

    Raises:
        ValueError: the offsets do not rise from 0 to the number of entries (torch's own conversions would read
            beyond them). The indices themselves are not checked.
    """
    if tensor.layout == torch.sparse_csr:
        count, arrays = tensor.shape[0], (tensor.crow_indices(), tensor.col_indices())
    else:
        count, arrays = tensor.shape[1], (tensor.ccol_indices(), tensor.row_indices())
    offsets, minor = (as_numpy(name, array) for array in arrays)
    steps = np.diff(offsets)
    if len(steps) != count or offsets[0] != 0 or offsets[-1] != len(minor) or (steps < 0).any():
        raise ValueError(
            f"{name}: malformed {tensor.layout} tensor: its {count + 1} offsets must rise from 0 to {len(minor)}"
        )
    major = np.repeat(np.arange(count), steps)
    return (major, minor) if tensor.layout == torch.sparse_csr else (minor, major)


def _as_indices(name: str, value: Any, width: int, num_vertices: int | None) -> tuple[np.ndarray, int]:
    """An integer array [*, width] of vertex numbers and the number of vertices, checked."""
    indices = as_numpy(name, value)
    if indices.size == 0 and indices.ndim <= 2:
        indices = indices.reshape(0, width).astype(np.int64)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {indices.dtype}")
    if indices.ndim != 2 or indices.shape[1] != width:
        raise ValueError(f"{name} must have shape [*, {width}], got {list(indices.shape)}")
    if num_vertices is None:
        count = int(indices.max()) + 1 if indices.size else 0
    elif isinstance(num_vertices, bool) or not isinstance(num_vertices, (int, np.integer)):
        raise TypeError(f"num_vertices must be an int or None, got {type(num_vertices).__name__}")
    elif num_vertices < 0:
        raise ValueError(f"num_vertices must not be negative, got {num_vertices}")
    else:
        count = int(num_vertices)
    wrong = (indices < 0) | (indices >= count)
    if wrong.any():
        row, corner = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name}[{row}, {corner}] is {indices[row, corner]}, accepted are 0 to {count - 1} "
            f"(num_vertices is {count})"
        )
    return indices.astype(np.int64), count


def sorted_unique(values: np.ndarray) -> np.ndarray:
    """The different numbers among integers that are not negative, ascending (np.unique is slow on millions)."""
    values = np.sort(values)
    return values[np.diff(values, prepend=-1) != 0]


def _from_pairs(rows: np.ndarray, columns: np.ndarray, count: int) -> Lists:
    """Sorted lists without duplicates from pairs in range."""
    entries = sorted_unique(rows * count + columns) if count else np.zeros(0, np.int64)
    check_entry_count(len(entries))
    degrees = np.bincount(entries // count, minlength=count) if count else np.zeros(0, np.int64)
    row_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(degrees)])
    return row_offsets, entries % count if count else entries


def lists_from_edges(edges: Any, num_vertices: int | None) -> Lists:
    """Both directions of every edge and every vertex itself."""
    pairs, count = _as_indices("edges", edges, 2, num_vertices)
    loops = np.arange(count, dtype=np.int64)
    rows = np.concatenate([pairs[:, 0], pairs[:, 1], loops])
    columns = np.concatenate([pairs[:, 1], pairs[:, 0], loops])
    return _from_pairs(rows, columns, count)


def lists_from_faces(faces: Any, num_vertices: int | None) -> Lists:
    """The edges of all triangles and every vertex itself."""
    corners, count = _as_indices("faces", faces, 3, num_vertices)
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    return lists_from_edges(edges, count)


def lists_from_adjacency(adjacency: Any) -> Lists:
    """The non-zero entries of a square matrix: SciPy sparse, NumPy, or torch (dense, COO, CSR, CSC)."""
    rows, columns, values, shape = _matrix_entries(adjacency)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"adjacency must be a square matrix, got shape {list(shape)}")
    if values.dtype.kind not in "biuf":
        raise TypeError(f"adjacency must hold numbers or booleans, got {values.dtype}")
    bad = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"adjacency[{rows[at]}, {columns[at]}] is {values[at]}, values must be finite")
    count = int(shape[0])
    wrong = (rows < 0) | (rows >= count) | (columns < 0) | (columns >= count)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"adjacency has an entry at [{rows[at]}, {columns[at]}], its shape is {list(shape)}")
    kept = values != 0
    return _from_pairs(rows[kept].astype(np.int64), columns[kept].astype(np.int64), count)


def _matrix_entries(adjacency: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """Rows, columns, values and shape of a matrix; entries may be repeated."""
    if scipy.sparse.issparse(adjacency):
        if len(adjacency.shape) != 2:
            raise ValueError(f"adjacency must be a square matrix, got shape {list(adjacency.shape)}")
        check_compressed("adjacency", adjacency)
        coo = adjacency.tocoo()
        return coo.row, coo.col, coo.data, coo.shape
    if isinstance(adjacency, torch.Tensor) and adjacency.layout != torch.strided:
        sparse = adjacency.detach().cpu()
        if sparse.dim() != 2 or (sparse.layout == torch.sparse_coo and sparse.sparse_dim() != 2):
            raise ValueError(f"adjacency must be a square matrix, got shape {list(sparse.shape)}")
        if sparse.layout in (torch.sparse_csr, torch.sparse_csc):
            rows, columns = compressed_entries("adjacency", sparse)
            return rows, columns, _plain_values(sparse.values()), tuple(sparse.shape)
        if sparse.layout != torch.sparse_coo:
            raise TypeError(f"adjacency must be a COO, CSR, CSC or dense tensor, got layout {sparse.layout}")
        indices = sparse._indices().numpy()  # as stored: coalescing would not check the range
        return indices[0], indices[1], _plain_values(sparse._values()), tuple(sparse.shape)
    if isinstance(adjacency, torch.Tensor):
        dense = _plain_values(adjacency.detach().cpu())
    else:
        dense = as_numpy("adjacency", adjacency)
    if dense.ndim != 2:
        raise ValueError(f"adjacency must be a square matrix, got shape {list(dense.shape)}")
    if dense.dtype.kind not in "biuf":
        raise TypeError(f"adjacency must hold numbers or booleans, got {dense.dtype}")
    rows, columns = np.nonzero(dense)
    return rows, columns, dense[rows, columns], dense.shape


def _plain_values(values: torch.Tensor) -> np.ndarray:
    """Values as NumPy, which has no bfloat16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def lists_from_mask(mask: Any, num_hubs: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Lists of the vertices of a whole L x L mask, and the number of hubs found or verified."""
    dense = as_numpy("mask", mask)
    if dense.dtype != np.bool_:
        raise TypeError(f"mask must be boolean (True where a query may attend), got {dense.dtype}")
    if dense.ndim != 2 or dense.shape[0] != dense.shape[1]:
        raise ValueError(f"mask must be square [L, L], got {list(dense.shape)}")
    full = np.asarray(dense.all(axis=0) & dense.all(axis=1))
    prefix = len(full) if full.all() else int(np.argmin(full))
    if num_hubs is None:
        hubs = min(prefix, MAX_HUBS)
    else:
        hubs = check_num_hubs(num_hubs)
        if hubs > len(full):
            raise ValueError(f"num_hubs is {hubs}, the mask has only {len(full)} tokens")
        if hubs > prefix:
            raise ValueError(
                f"num_hubs is {hubs}, but row or column {prefix} of mask is not all True: only the first "
                f"{prefix} tokens are hubs"
            )
    rows, columns = np.nonzero(dense[hubs:, hubs:])
    return *_from_pairs(rows.astype(np.int64), columns.astype(np.int64), len(full) - hubs), hubs


def check_lists(row_offsets: Any, columns: Any) -> Lists:
    """Neighbour lists as given by a caller, checked, sorted, duplicates merged."""
    offsets, indices = as_numpy("row_offsets", row_offsets), as_numpy("columns", columns)
    for name, array in (("row_offsets", offsets), ("columns", indices)):
        if array.ndim != 1:
            raise ValueError(f"{name} must have one axis, got shape {list(array.shape)}")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got {array.dtype}")
    offsets, indices = offsets.astype(np.int64), indices.astype(np.int64)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(indices) or (np.diff(offsets) < 0).any():
        raise ValueError(f"row_offsets must rise from 0 to len(columns) = {len(indices)} in num_vertices + 1 steps")
    count = len(offsets) - 1
    wrong = (indices < 0) | (indices >= count)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"columns[{at}] is {indices[at]}, accepted are 0 to {count - 1}")
    rows = np.repeat(np.arange(count, dtype=np.int64), np.diff(offsets))
    return _from_pairs(rows, indices, count)
