"""Processing order and tile schedule of topology-masked attention.

Two questions are answered here, once per topology and on the CPU:

* In which order are the vertices worked on? :func:`locality_order` puts vertices that are close on the mesh next
  to each other (recursive spectral bisection), so that the neighbourhoods of consecutive rows overlap.
* Which keys does a tile of 16, 32 or 64 consecutive rows need? :func:`build_schedule` lists them for every window,
  with one bit per row that tells which rows of the window may use the key.

A kernel then gathers each listed key once and serves all rows of the window with it on tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from fastmetro_kernels.bisection import bisection_order

WINDOW_ROWS = 16  # rows of the narrowest tile: the M of a tensor core instruction
WINDOW_SIZES = (16, 32, 64)  # rows of one tile, and the number of bits of its row masks
KEY_ALIGNMENT = 16  # key lists are padded to the depth of a tensor core instruction

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

    Recursive spectral bisection, see :mod:`fastmetro_kernels.bisection`, down to parts of one window. Connected
    components are ordered one after the other, the largest first. The result depends on the graph only.

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
    return torch.from_numpy(bisection_order(graph, WINDOW_ROWS))


def _csr_arrays(row_offsets: Tensor, columns: Tensor) -> tuple[_IntArray, _IntArray]:
    return (
        row_offsets.detach().cpu().numpy().astype(np.int64),
        columns.detach().cpu().numpy().astype(np.int64),
    )
