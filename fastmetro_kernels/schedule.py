"""Processing order and tile schedule of topology-masked attention.

Two questions are answered here, once per topology and on the CPU:

* In which order are the vertices worked on? :func:`locality_order` puts vertices that are close on the mesh next
  to each other (recursive spectral bisection: Pothen, Simon and Liou 1990, with Fiedler's vector), so that the
  neighbourhoods of consecutive rows overlap.
* Which keys does a tile of 16, 32 or 64 consecutive rows need? :func:`build_schedule` lists them for every window,
  with one bit per row that tells which rows of the window may use the key.

A kernel then gathers each listed key once and serves all rows of the window with it on tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

WINDOW_ROWS = 16  # rows of the narrowest tile: the M of a tensor core instruction
WINDOW_SIZES = (16, 32, 64)  # rows of one tile, and the number of bits of its row masks
KEY_ALIGNMENT = 16  # key lists are padded to the depth of a tensor core instruction

_DENSE_EIGENSOLVER = 192  # up to this many vertices LAPACK beats shift-invert Lanczos
_SPECTRAL_LIMIT = 16384  # larger parts are halved by reverse Cuthill-McKee levels, whose cost is linear

_IntArray = npt.NDArray[np.int64]


class Schedule(NamedTuple):
    """Tile schedule of one direction (rows, or for the transposed graph columns) of a topology.

    Attributes:
        row_order: int32 ``[W * R]``, the vertices in processing order, padded with -1. Window ``w`` works on
            ``row_order[R w : R w + R]``; R is 16 unless said otherwise.
        key_offsets: int32 ``[W + 1]``, multiples of 16; the keys of window ``w`` are
            ``keys[key_offsets[w] : key_offsets[w + 1]]``.
        keys: int32 ``[T]``, vertices that at least one row of the window may attend to, ascending within a window,
            then -1 as padding. Hub tokens are not listed: every row sees all of them.
        row_masks: int32 ``[T]`` (int64 where R is 64), bit ``r`` is set when row ``r`` of the window may attend to the
            key; 0 for padding.
        longest: number of keys of the longest list, padding not counted.
        mean: mean number of keys of a list, padding not counted.
    """

    row_order: Tensor
    key_offsets: Tensor
    keys: Tensor
    row_masks: Tensor
    longest: int
    mean: float


def build_schedule(
    row_offsets: Tensor, columns: Tensor, order: Tensor | None = None, window_rows: int = WINDOW_ROWS
) -> Schedule:
    """Cut the rows, taken in ``order``, into windows and list the keys that each window gathers.

    For a symmetric graph the result also serves the column pass of the backward (which rows use a key: the same
    list). Otherwise build a second schedule from the transposed graph with the same order.

    Args:
        row_offsets: int32 or int64 ``[N + 1]``, CSR offsets of the N vertex rows.
        columns: int32 or int64 ``[nnz]``, vertices each row may attend to, no duplicates within a row.
        order: permutation of the vertices ``[N]`` (see :func:`locality_order`); ``None`` keeps the natural order.
        window_rows: rows of a window, 16, 32 or 64.

    Returns:
        The schedule, on the CPU.

    Raises:
        ValueError: if ``order`` is not a permutation of the vertices, or ``window_rows`` is another number.
    """
    if window_rows not in WINDOW_SIZES:
        raise ValueError(f"window_rows must be 16, 32 or 64, got {window_rows}")
    offsets, targets = _csr_arrays(row_offsets, columns)
    count = len(offsets) - 1
    permutation = np.arange(count) if order is None else order.detach().cpu().numpy().astype(np.int64)
    if permutation.shape != (count,) or not np.array_equal(np.sort(permutation), np.arange(count)):
        raise ValueError(
            f"order must be a permutation of the {count} vertices, got {permutation.size} numbers that are not"
        )
    windows = -(-count // window_rows)
    row_order = np.full(windows * window_rows, -1, np.int32)
    row_order[:count] = permutation
    position = np.empty(count, np.int64)
    position[permutation] = np.arange(count)

    entry_position = np.repeat(position, np.diff(offsets))
    pairs, inverse = np.unique(entry_position // window_rows * max(count, 1) + targets, return_inverse=True)
    masks = np.zeros(len(pairs), np.int64)
    np.bitwise_or.at(masks, inverse, np.int64(1) << (entry_position % window_rows))

    window_of_pair = pairs // max(count, 1)
    lengths = np.bincount(window_of_pair, minlength=windows)
    padded = -(-lengths // KEY_ALIGNMENT) * KEY_ALIGNMENT
    key_offsets = np.concatenate([[0], np.cumsum(padded)])
    if key_offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"the topology lists {key_offsets[-1]} keys, more than 2^31 - 1 are not supported")
    first_pair = np.cumsum(lengths) - lengths
    slot = key_offsets[window_of_pair] + np.arange(len(pairs)) - first_pair[window_of_pair]
    keys = np.full(key_offsets[-1], -1, np.int32)
    keys[slot] = pairs % max(count, 1)
    row_masks = np.zeros(key_offsets[-1], np.int64 if window_rows > 32 else np.int32)
    row_masks[slot] = masks
    return Schedule(
        torch.from_numpy(row_order),
        torch.from_numpy(key_offsets.astype(np.int32)),
        torch.from_numpy(keys),
        torch.from_numpy(row_masks),
        int(lengths.max(initial=0)),
        float(lengths.mean()) if windows else 0.0,
    )


def locality_order(row_offsets: Tensor, columns: Tensor) -> Tensor:
    """Order the vertices so that windows of 16 or more consecutive ones are compact patches of the mesh.

    Recursive spectral bisection (Pothen, Simon, Liou: Partitioning sparse matrices with eigenvectors of graphs,
    1990): the vertices are sorted by the Fiedler vector of their Laplacian and cut near the middle, at a multiple of
    the window size, until 16 are left. Connected components are ordered one after the other, the largest first.
    Parts of more than 16384 vertices are cut by their reverse Cuthill-McKee order instead, which costs linear time.
    The result depends on the graph only: eigensolvers start from a fixed vector, and ties go to the lower vertex.

    Args:
        row_offsets: int32 or int64 ``[N + 1]``, CSR offsets; the graph is symmetrised for the purpose.
        columns: int32 or int64 ``[nnz]``.

    Returns:
        int64 ``[N]`` on the CPU: the vertex at each position.
    """
    offsets, targets = _csr_arrays(row_offsets, columns)
    count = len(offsets) - 1
    rows = np.repeat(np.arange(count), np.diff(offsets))
    off_diagonal = rows != targets
    pattern = scipy.sparse.coo_matrix(
        (np.ones(int(off_diagonal.sum())), (rows[off_diagonal], targets[off_diagonal])), shape=(count, count)
    ).tocsr()
    graph = scipy.sparse.csr_matrix(pattern + pattern.T)
    graph.sort_indices()
    graph.data[:] = 1.0
    order = np.empty(count, np.int64)
    _order_part(graph, np.arange(count), 0, order)
    return torch.from_numpy(order)


def _csr_arrays(row_offsets: Tensor, columns: Tensor) -> tuple[_IntArray, _IntArray]:
    return (
        row_offsets.detach().cpu().numpy().astype(np.int64),
        columns.detach().cpu().numpy().astype(np.int64),
    )


def _order_part(graph: scipy.sparse.csr_matrix, vertices: _IntArray, start: int, order: _IntArray) -> None:
    """Write an order of ``vertices`` (whose induced graph is ``graph``) to ``order[start:]``."""
    count = len(vertices)
    if count <= WINDOW_ROWS:
        order[start : start + count] = vertices
        return
    components, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    if components > 1:
        _order_components(graph, vertices, start, order, label)
        return
    ranked = _one_dimensional_order(graph)
    cut = _cut_position(count, start)
    for local, begin in ((np.sort(ranked[:cut]), start), (np.sort(ranked[cut:]), start + cut)):
        _order_part(graph[local][:, local], vertices[local], begin, order)


def _order_components(
    graph: scipy.sparse.csr_matrix, vertices: _IntArray, start: int, order: _IntArray, label: _IntArray
) -> None:
    sizes = np.bincount(label)
    # Sorting vertices by (size of their component, component) makes every component contiguous; components are
    # numbered by their lowest vertex, and isolated vertices, of which there may be very many, come last together.
    grouped = np.lexsort((np.arange(len(vertices)), label, -sizes[label]))
    begin = 0
    while begin < len(grouped) and sizes[label[grouped[begin]]] > 1:
        local = grouped[begin : begin + sizes[label[grouped[begin]]]]
        if len(local) > WINDOW_ROWS:
            _order_part(graph[local][:, local], vertices[local], start + begin, order)
        else:  # there may be very many of these
            order[start + begin : start + begin + len(local)] = vertices[local]
        begin += len(local)
    order[start + begin : start + len(grouped)] = vertices[grouped[begin:]]


def _cut_position(count: int, start: int) -> int:
    """Cut near the middle so that the second part starts at a multiple of one or, while there are many, two windows."""
    unit = WINDOW_ROWS if count < 4 * WINDOW_ROWS else 2 * WINDOW_ROWS
    cut = round((start + count / 2) / unit) * unit - start
    if cut <= 0:
        cut += unit
    elif cut >= count:
        cut -= unit
    return cut


def _one_dimensional_order(graph: scipy.sparse.csr_matrix) -> _IntArray:
    """Sort a connected graph along its longest direction."""
    count = graph.shape[0]
    if count > _SPECTRAL_LIMIT:
        return _cuthill_mckee(graph)
    laplacian = scipy.sparse.csgraph.laplacian(graph)
    if count <= _DENSE_EIGENSOLVER:
        fiedler = scipy.linalg.eigh(laplacian.toarray(), subset_by_index=[1, 1])[1][:, 0]
    else:
        try:
            values, vectors = scipy.sparse.linalg.eigsh(
                laplacian.tocsc(), k=2, sigma=-1e-4, v0=np.random.default_rng(0).random(count)
            )
        except scipy.sparse.linalg.ArpackNoConvergence:
            return _cuthill_mckee(graph)
        fiedler = vectors[:, np.argsort(values)[1]]
    largest = np.abs(fiedler).max()
    # The sign is free: fix it. Rounding lets vertices that symmetry makes equal keep their natural order.
    sign = np.sign(fiedler[np.argmax(np.abs(fiedler) > 0.5 * largest)])
    return np.argsort(np.round(sign * fiedler / largest, 6), kind="stable")


def _cuthill_mckee(graph: scipy.sparse.csr_matrix) -> _IntArray:
    order = scipy.sparse.csgraph.reverse_cuthill_mckee(graph, symmetric_mode=True)
    return np.asarray(order, dtype=np.int64)
