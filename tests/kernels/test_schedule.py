"""The processing order and the tile schedule of topology-masked attention."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from fastmetro_kernels.schedule import WINDOW_ROWS, WINDOW_SIZES, Schedule, build_schedule, locality_order


def csr(matrix: scipy.sparse.spmatrix | np.ndarray) -> tuple[Tensor, Tensor]:
    sparse = scipy.sparse.csr_matrix(matrix)
    sparse.sort_indices()
    return torch.from_numpy(sparse.indptr), torch.from_numpy(sparse.indices)


def grid(height: int, width: int) -> scipy.sparse.csr_matrix:
    """A triangulated grid with self loops, vertices numbered at random so that the natural order is a bad one."""
    number = np.random.default_rng(0).permutation(height * width).reshape(height, width)
    edges = [(number[1:], number[:-1]), (number[:, 1:], number[:, :-1]), (number[1:, 1:], number[:-1, :-1])]
    rows = np.concatenate([a.ravel() for a, _ in edges])
    columns = np.concatenate([b.ravel() for _, b in edges])
    half = scipy.sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(number.size, number.size))
    return ((half + half.T + scipy.sparse.eye(number.size)) != 0).tocsr()


def pairs_of(schedule: Schedule, size: int = WINDOW_ROWS) -> set[tuple[int, int]]:
    """All (row, key) pairs of a schedule with windows of `size` rows, read the way a kernel reads it."""
    offsets = schedule.key_offsets.tolist()
    found = []
    for window in range(len(offsets) - 1):
        rows = schedule.row_order[size * window : size * (window + 1)].tolist()
        for slot in range(offsets[window], offsets[window + 1]):
            mask = int(schedule.row_masks[slot])
            assert -(2 ** (size - 1)) <= mask < 2**size, "no bits beyond the rows; the last may be the sign"
            found += [(rows[bit], int(schedule.keys[slot])) for bit in range(size) if mask >> bit & 1]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("size", WINDOW_SIZES)
def test_schedule_holds_exactly_the_pairs_of_the_graph(count: int, density: float, ordered: bool, size: int) -> None:
    rng = np.random.default_rng(count)
    dense = rng.random((count, count)) < density
    order = torch.from_numpy(rng.permutation(count)) if ordered else None
    schedule = build_schedule(*csr(dense), order, size)
    assert pairs_of(schedule, size) == set(zip(*(axis.tolist() for axis in np.nonzero(dense)), strict=True))

    windows = -(-count // size)
    expected = order if ordered else torch.arange(count)
    assert schedule.row_order.shape == (windows * size,)
    assert torch.equal(schedule.row_order[:count].long(), expected.long())
    assert (schedule.row_order[count:] == -1).all()
    assert all(tensor.dtype == torch.int32 for tensor in schedule[:3])
    assert schedule.row_masks.dtype == (torch.int64 if size == 64 else torch.int32)
    assert (schedule.key_offsets % 16 == 0).all() and len(schedule.key_offsets) == windows + 1
    lengths = []
    for begin, end in zip(schedule.key_offsets[:-1].tolist(), schedule.key_offsets[1:].tolist(), strict=True):
        keys = schedule.keys[begin:end].tolist()
        listed = [key for key in keys if key >= 0]
        assert listed == sorted(set(listed)) and keys == listed + [-1] * (len(keys) - len(listed))
        assert len(keys) - len(listed) < 16
        lengths.append(len(listed))
    assert schedule.longest == max(lengths, default=0)
    assert schedule.mean == pytest.approx(np.mean(lengths) if lengths else 0.0)


def test_window_sizes_that_no_kernel_takes() -> None:
    with pytest.raises(ValueError, match="window_rows must be 16, 32 or 64, got 48"):
        build_schedule(*csr(np.eye(3)), window_rows=48)


def test_symmetric_graph_has_one_schedule_for_rows_and_columns() -> None:
    graph = grid(6, 9)
    order = locality_order(*csr(graph))
    for forward, transposed in zip(
        build_schedule(*csr(graph), order), build_schedule(*csr(graph.T), order), strict=True
    ):
        assert torch.equal(torch.as_tensor(forward), torch.as_tensor(transposed))


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1], [0, 1, 2, 3]])
def test_order_must_be_a_permutation(order: list[int]) -> None:
    with pytest.raises(ValueError, match="order must be a permutation of the 3 vertices"):
        build_schedule(*csr(np.eye(3)), torch.tensor(order))


@pytest.mark.parametrize("count", [0, 1, 2, 16, 17, 31, 33, 50, 300])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2])
def test_order_is_a_permutation_of_any_graph(count: int, density: float) -> None:
    rng = np.random.default_rng(count)
    order = locality_order(*csr(rng.random((count, count)) < density))
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(count))


def test_order_is_the_same_every_time_and_needs_no_self_loops() -> None:
    graph = grid(30, 31)
    first = locality_order(*csr(graph))
    np.random.default_rng().random()  # global random state plays no part
    torch.rand(3)
    assert torch.equal(first, locality_order(*csr(graph)))
    graph.setdiag(0)
    graph.eliminate_zeros()
    assert torch.equal(first, locality_order(*csr(graph)))


def _digest() -> str:
    """Of the orders of a mesh whose symmetry makes many values equal, and of a star, whose leaves are all equal."""
    height, width = np.divmod(np.arange(1024), 32)
    near = (np.abs(height[:, None] - height) + np.abs(width[:, None] - width)) == 1
    star = np.zeros((500, 500))
    star[0] = star[:, 0] = 1
    orders = [locality_order(*csr(matrix)).numpy() for matrix in (near, star, grid(60, 60))]
    return hashlib.sha256(np.concatenate(orders).tobytes()).hexdigest()


def test_order_depends_neither_on_threads_nor_on_the_processor() -> None:
    """Another process takes OpenBLAS's kernels for an old processor, which round differently, and two threads."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "import test_schedule; print(test_schedule._digest())"],
        env={
            **os.environ,
            "OPENBLAS_CORETYPE": "Prescott",
            "OPENBLAS_NUM_THREADS": "2",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(root)]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == _digest()


def test_components_stay_together() -> None:
    blocks = [grid(5, 5), grid(4, 10), np.ones((3, 3)), np.zeros((2, 2)), grid(9, 9)]
    order = locality_order(*csr(scipy.sparse.block_diag(blocks)))
    sizes = np.array([block.shape[0] for block in blocks])
    component = np.repeat(np.arange(len(blocks)), sizes)[order.numpy()]
    changes = np.flatnonzero(np.diff(component)) + 1
    assert [int(component[0]), *component[changes].tolist()] == [4, 1, 0, 2, 3]  # largest first, isolated ones last
    assert order[-2:].tolist() == [68, 69]


@pytest.mark.parametrize("side", [13, 50, 83])
def test_windows_of_a_shuffled_grid_are_compact(side: int) -> None:
    lists = csr(grid(side, side))
    schedule = build_schedule(*lists, locality_order(*lists))
    natural = build_schedule(*lists)
    # A square patch of 16 vertices of this grid and its neighbours: 4 x 4 and a rim of 18.
    assert schedule.mean <= 38
    assert schedule.longest <= 50
    assert natural.mean > 2 * schedule.mean


def test_large_mesh_is_ordered_in_little_time_and_well() -> None:
    """An order that cost more per vertex on large meshes would need minutes here; it takes about a second."""
    lists = csr(grid(150, 300))
    start = time.perf_counter()
    order = locality_order(*lists)
    assert time.perf_counter() - start < 30
    assert torch.equal(order.sort().values, torch.arange(45_000))
    schedule = build_schedule(*lists, order)
    assert schedule.mean <= 38 and schedule.longest <= 58


def edges_of(pairs: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    half = scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(count, count))
    return csr((half + half.T + scipy.sparse.eye(count)) != 0)


@pytest.mark.parametrize("kind", ["path", "isolated", "star", "stars", "pieces of all sizes"])
def test_large_graphs_that_are_no_meshes_take_little_time(kind: str) -> None:
    count = 50_000
    number = np.arange(count)
    path = np.stack([number[:-1], number[1:]], axis=1)
    pairs = {
        "path": path,
        "isolated": np.zeros((0, 2), np.int64),
        "star": np.stack([np.zeros(count - 1, np.int64), number[1:]], axis=1),
        "stars": np.stack([number // 5000 * 5000, number], axis=1),
        "pieces of all sizes": path[~np.isin(number[1:], np.cumsum(number[:310]))],
    }[kind]
    lists = edges_of(pairs, count)
    start = time.perf_counter()
    order = locality_order(*lists)
    assert time.perf_counter() - start < 30
    assert torch.equal(order.sort().values, torch.arange(count))
    if kind in ("path", "pieces of all sizes"):
        assert build_schedule(*lists, order).mean < 18.1, "consecutive vertices and a neighbour at either end"
    if kind == "isolated":
        assert torch.equal(order, torch.arange(count))


def test_many_small_components_take_no_time() -> None:
    count = 20_000
    partner = torch.arange(count) ^ 1
    start = time.perf_counter()
    order = locality_order(torch.arange(count + 1), partner)
    assert time.perf_counter() - start < 60  # a second or two; an eigensolver per component would take minutes
    assert (order.view(-1, 2)[:, 0] ^ 1).equal(order.view(-1, 2)[:, 1])


@pytest.mark.parametrize("name", ["mano_195", "smpl_431", "smpl_1723"])
def test_published_meshes_need_at_most_64_keys_with_the_joints(shared: Path, name: str) -> None:
    folder = shared / "data/fastmetro"
    vertices = int(name.split("_")[1])
    path = folder / (f"{name}_faces.npy" if vertices == 1723 else f"{name}_adjmat_indices.pt")
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    if vertices == 1723:
        faces = np.load(path, allow_pickle=False).astype(np.int64)
        rows, columns = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).T
    else:
        rows, columns = torch.load(path, weights_only=True).long().numpy()
    half = scipy.sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(vertices, vertices))
    lists = csr((half + half.T + scipy.sparse.eye(vertices)) != 0)
    schedule = build_schedule(*lists, locality_order(*lists))
    assert schedule.longest + (21 if name == "mano_195" else 14) <= 64
    assert schedule.mean < 38
    assert build_schedule(*lists).longest > schedule.longest
