"""`TokenTopology`: what it accepts, what it refuses and how, and that it behaves as a module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from attention_cases import FLOAT32_RUNNERS, Runner, graphs, grid_faces, random_mask, topology_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastmetro_kernels import adjacency
from fastmetro_kernels.attention import topology_attention
from fastmetro_kernels.topology import TokenTopology

SQUARE = [[0, 1, 2], [0, 2, 3]]  # two triangles; 1 and 3 are not joined


def square_mask() -> np.ndarray:
    mask = np.ones((4, 4), bool)
    mask[1, 3] = mask[3, 1] = False
    return mask


@pytest.mark.parametrize(
    "faces",
    [SQUARE, np.array(SQUARE, np.int32), np.array(SQUARE, np.uint16), torch.tensor(SQUARE), SQUARE + SQUARE],
    ids=["list", "int32", "uint16", "tensor", "repeated faces"],
)
def test_from_faces(faces: Any) -> None:
    topology = TokenTopology.from_faces(faces)
    assert topology.num_vertices == topology.num_tokens == 4 and topology.num_hubs == 0
    np.testing.assert_array_equal(topology.mask().numpy(), square_mask())
    assert topology.nnz == 14 and topology.max_degree == 4 and topology.symmetric
    assert topology.row_offsets.dtype == topology.columns.dtype == torch.int32


def test_from_edges_is_undirected_with_self_loops() -> None:
    topology = TokenTopology.from_edges([[0, 1], [1, 0], [2, 2]], num_vertices=4, num_hubs=1)
    expected = np.eye(5, dtype=bool)
    expected[0] = expected[:, 0] = True
    expected[1, 2] = expected[2, 1] = True
    np.testing.assert_array_equal(topology.mask().numpy(), expected)


def test_unused_vertices_see_themselves() -> None:
    topology = TokenTopology.from_faces(SQUARE, num_vertices=6)
    assert topology.num_vertices == 6
    assert topology.mask()[4:].nonzero().tolist() == [[0, 4], [1, 5]]


@pytest.mark.parametrize("count", [0, 3])
def test_no_faces(count: int) -> None:
    topology = TokenTopology.from_faces(np.zeros((0, 3), np.int64), num_vertices=count, num_hubs=2)
    assert topology.num_tokens == count + 2 and topology.nnz == count


def _adjacencies() -> dict[str, Any]:
    dense = square_mask().astype(np.float32) * 0.25
    coo = scipy.sparse.coo_matrix(dense)
    twice = scipy.sparse.coo_matrix((np.tile(coo.data, 2), (np.tile(coo.row, 2), np.tile(coo.col, 2))), shape=(4, 4))
    stored_zero = dense.copy()
    stored_zero[1, 3] = 1.0
    with_zero = scipy.sparse.csr_matrix(stored_zero)
    with_zero.data[with_zero.nonzero()[0].tolist().index(1) + 3] = 0.0
    tensor = torch.from_numpy(dense)
    return {
        "dense": dense,
        "bool": square_mask(),
        "nested list": dense.tolist(),
        "csr": scipy.sparse.csr_matrix(dense),
        "csc array": scipy.sparse.csc_array(dense),
        "coo with duplicates": twice,
        "stored zeros": with_zero,
        "tensor": tensor,
        "bfloat16": tensor.bfloat16(),
        "torch coo": tensor.to_sparse_coo(),
        "torch csr": tensor.to_sparse_csr(),
        "torch csc": tensor.to_sparse_csc(),
        "with gradient": tensor.clone().requires_grad_(),
    }


@pytest.mark.parametrize("name", _adjacencies())
def test_from_adjacency(name: str) -> None:
    topology = TokenTopology.from_adjacency(_adjacencies()[name], num_hubs=2)
    assert topology.num_hubs == 2
    np.testing.assert_array_equal(topology.mask()[2:, 2:].numpy(), square_mask())
    assert topology.nnz == 14, "duplicates are merged and stored zeros left out"


def test_duplicates_that_cancel_still_count() -> None:
    entries = scipy.sparse.coo_matrix(([1.0, -1.0, 1.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    assert TokenTopology.from_adjacency(entries).nnz == 2


def test_nothing_is_added_to_an_adjacency() -> None:
    topology = TokenTopology.from_adjacency(np.zeros((3, 3)), num_hubs=1)
    assert topology.nnz == 0 and topology.max_degree == 0
    assert topology.mask().sum() == 3 + 3 + 1


def test_asymmetric_lists() -> None:
    pattern = np.eye(4)
    pattern[2, 1] = pattern[3, 0] = 1
    with pytest.raises(ValueError, match=r"symmetric=True .* vertex 2 may attend to vertex 1"):
        TokenTopology.from_adjacency(pattern)
    topology = TokenTopology.from_adjacency(pattern, symmetric=False)
    assert not topology.symmetric
    transposed = TokenTopology(topology.t_row_offsets, topology.t_columns, symmetric=False)
    np.testing.assert_array_equal(transposed.mask().numpy(), pattern.T.astype(bool))
    assert TokenTopology.from_adjacency(np.eye(4), symmetric=False).symmetric, "the attribute tells the fact"


@pytest.mark.parametrize("kind", ["numpy", "torch", "list"])
@pytest.mark.parametrize("name", graphs())
def test_from_mask_finds_hubs(name: str, kind: str) -> None:
    mask = graphs()[name].mask
    given_mask = {"numpy": mask.numpy(), "torch": mask, "list": mask.tolist()}[kind]
    topology = TokenTopology.from_mask(given_mask)
    dense = (mask.all(0) & mask.all(1)).tolist()
    expected = dense.index(False) if False in dense else len(dense)
    assert topology.num_hubs == min(expected, 64)
    assert torch.equal(topology.mask(), mask)
    assert topology.symmetric == torch.equal(
        mask[topology.num_hubs :, topology.num_hubs :], mask[topology.num_hubs :, topology.num_hubs :].T
    )


def test_from_mask_with_a_given_number_of_hubs() -> None:
    mask = random_mask(9, 3, 0.3, True, True, 0)
    for hubs in range(4):
        topology = TokenTopology.from_mask(mask, num_hubs=hubs)
        assert topology.num_hubs == hubs and torch.equal(topology.mask(), mask)
    with pytest.raises(ValueError, match="num_hubs is 4, but row or column 3"):
        TokenTopology.from_mask(mask, num_hubs=4)
    with pytest.raises(ValueError, match="only 12 tokens"):
        TokenTopology.from_mask(mask, num_hubs=13)


def test_dense_tokens_beyond_64_become_vertices() -> None:
    topology = TokenTopology.from_mask(torch.ones(70, 70, dtype=torch.bool))
    assert (topology.num_hubs, topology.num_vertices, topology.nnz) == (64, 6, 36)
    assert topology.mask().all()


def test_a_dense_row_without_its_column_is_no_hub() -> None:
    mask = torch.eye(5, dtype=torch.bool)
    mask[0] = True
    topology = TokenTopology.from_mask(mask)
    assert topology.num_hubs == 0 and torch.equal(topology.mask(), mask)


NAN = np.array([[1.0, np.nan], [np.nan, 1.0]])


def unchecked_csr(offsets: list[int], columns: list[int]) -> torch.Tensor:
    """A 2 x 2 CSR tensor whose arrays need not fit: torch's own conversion of it may read beyond its memory."""
    return torch.sparse_csr_tensor(offsets, columns, torch.ones(len(columns)), (2, 2), check_invariants=False)


def unchecked_scipy(offsets: list[int], columns: list[int]) -> scipy.sparse.csr_matrix:
    """The same in SciPy."""
    matrix = scipy.sparse.csr_matrix(np.eye(2))
    matrix.indptr[:], matrix.indices[:] = offsets, columns
    return matrix


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TokenTopology.from_faces([[0.0, 1.0, 2.0]]), TypeError, "faces must hold integers, got float64"),
        (lambda: TokenTopology.from_faces([[0, 1]]), ValueError, r"faces must have shape \[\*, 3\], got \[1, 2\]"),
        (lambda: TokenTopology.from_faces([[0, 1, 2], [0, 1]]), ValueError, "faces must be a rectangular array"),
        (lambda: TokenTopology.from_faces([[0, 1, -1]]), ValueError, r"faces\[0, 2\] is -1"),
        (lambda: TokenTopology.from_faces(SQUARE, 3), ValueError, r"faces\[1, 2\] is 3, accepted are 0 to 2"),
        (lambda: TokenTopology.from_faces(SQUARE, -1), ValueError, "num_vertices must not be negative"),
        (lambda: TokenTopology.from_faces(SQUARE, 4.0), TypeError, "num_vertices must be an int or None, got float"),
        (lambda: TokenTopology.from_edges([[0, 5]], 3), ValueError, r"edges\[0, 1\] is 5"),
        (lambda: TokenTopology.from_edges("mesh"), TypeError, "edges must hold integers"),
        (lambda: TokenTopology.from_faces(SQUARE, num_hubs=65), ValueError, "num_hubs must be 0 to 64, got 65"),
        (lambda: TokenTopology.from_faces(SQUARE, num_hubs=-1), ValueError, "num_hubs must be 0 to 64, got -1"),
        (lambda: TokenTopology.from_faces(SQUARE, num_hubs=1.5), TypeError, "num_hubs must be an int, got float"),
        (lambda: TokenTopology.from_faces(SQUARE, num_hubs=True), TypeError, "num_hubs must be an int, got bool"),
        (lambda: TokenTopology.from_faces(SQUARE, order="best"), ValueError, "'natural', 'locality'"),
        (lambda: TokenTopology.from_adjacency(np.ones((2, 3))), ValueError, r"square matrix, got shape \[2, 3\]"),
        (lambda: TokenTopology.from_adjacency(np.ones(4)), ValueError, r"square matrix, got shape \[4\]"),
        (lambda: TokenTopology.from_adjacency(torch.ones(2, 2, 2).to_sparse()), ValueError, "square matrix"),
        (lambda: TokenTopology.from_adjacency(NAN), ValueError, r"adjacency\[0, 1\] is nan"),
        (lambda: TokenTopology.from_adjacency(scipy.sparse.csr_matrix(NAN)), ValueError, "values must be finite"),
        (lambda: TokenTopology.from_adjacency(torch.eye(2) * torch.inf), ValueError, "must be finite"),
        (lambda: TokenTopology.from_adjacency(np.array([["a"]])), TypeError, "numbers or booleans"),
        (lambda: TokenTopology.from_adjacency(np.eye(2) * 1j), TypeError, "numbers or booleans, got complex128"),
        (lambda: TokenTopology.from_adjacency(unchecked_csr([0, 1, 3], [0, 1])), ValueError, "rise from 0 to 2"),
        (lambda: TokenTopology.from_adjacency(unchecked_csr([0, 3, 2], [0, 1])), ValueError, "rise from 0 to 2"),
        (lambda: TokenTopology.from_adjacency(unchecked_csr([0, 1, 2], [0, 9])), ValueError, r"entry at \[1, 9\]"),
        (lambda: TokenTopology.from_adjacency(unchecked_scipy([0, 1, 9], [0, 1])), ValueError, "malformed CSR"),
        (lambda: TokenTopology.from_adjacency(unchecked_scipy([0, 1, 2], [0, -1])), ValueError, "malformed CSR"),
        (lambda: TokenTopology.from_adjacency(torch.eye(2).to_sparse_bsr((1, 1))), TypeError, "got layout .*bsr"),
        (lambda: TokenTopology.from_faces(torch.ones(1, 3).bfloat16()), TypeError, "faces cannot be .*bfloat16"),
        (lambda: TokenTopology.from_mask(torch.eye(3).bool().to_sparse()), TypeError, "mask cannot be .*sparse_coo"),
        (lambda: TokenTopology.from_mask(np.ones((70, 70), bool), num_hubs=65), ValueError, "0 to 64, got 65"),
        (lambda: TokenTopology.from_mask(np.eye(3)), TypeError, "mask must be boolean .* got float64"),
        (lambda: TokenTopology.from_mask(torch.eye(3)), TypeError, "mask must be boolean"),
        (lambda: TokenTopology.from_mask(np.ones((2, 3), bool)), ValueError, r"square \[L, L\], got \[2, 3\]"),
        (lambda: TokenTopology([0, 1], [1]), ValueError, r"columns\[0\] is 1, accepted are 0 to 0"),
        (lambda: TokenTopology([0, 1], [-1]), ValueError, r"columns\[0\] is -1"),
        (lambda: TokenTopology([0, 2, 1], [0]), ValueError, "row_offsets must rise from 0"),
        (lambda: TokenTopology([], []), ValueError, "row_offsets must rise from 0"),
        (lambda: TokenTopology([0.0, 1.0], [0]), TypeError, "row_offsets must hold integers"),
        (lambda: TokenTopology([[0, 1]], [0]), ValueError, "row_offsets must have one axis"),
        (lambda: adjacency.check_entry_count(2**31), ValueError, "2147483648 neighbour entries, at most 2147483647"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_bad_input_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_entries_out_of_range_in_a_sparse_tensor() -> None:
    entries = torch.sparse_coo_tensor([[0], [5]], [1.0], (2, 2), check_invariants=False)
    with pytest.raises(ValueError, match=r"entry at \[0, 5\]"):
        TokenTopology.from_adjacency(entries)


def test_lists_are_sorted_and_merged() -> None:
    topology = TokenTopology([0, 4, 6], [1, 0, 1, 0, 1, 0])
    assert topology.columns.tolist() == [0, 1, 0, 1] and topology.row_offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("name", "hubs", "vertices", "entries"), [("smpl_431", 14, 431, 3005), ("mano_195", 21, 195, 1331)]
)
def test_published_masks(shared: Any, name: str, hubs: int, vertices: int, entries: int) -> None:
    folder = shared / "data" / "fastmetro"
    indices, values, size = (
        torch.load(folder / f"{name}_adjmat_{part}.pt", weights_only=True) for part in ("indices", "values", "size")
    )
    matrix = torch.sparse_coo_tensor(indices, values, tuple(size), check_invariants=True)
    topology = TokenTopology.from_adjacency(matrix, num_hubs=hubs, order="locality")
    assert (topology.num_vertices, topology.nnz) == (vertices, entries)
    mask = torch.ones(hubs + vertices, hubs + vertices, dtype=torch.bool)
    mask[hubs:, hubs:] = matrix.to_dense() != 0
    assert torch.equal(topology.mask(), mask)
    again = TokenTopology.from_mask(mask)
    assert again.num_hubs == hubs and torch.equal(again.columns, topology.columns)


# ---- permutation and schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mesh", "asymmetric", "isolated_with_hubs", "hubs_only"])
def test_permute(name: str) -> None:
    topology = topology_of(graphs()[name])
    order = torch.randperm(topology.num_vertices, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.arange(topology.num_hubs), topology.num_hubs + order])
    permuted = topology.permute(order)
    assert torch.equal(permuted.mask(), topology.mask()[tokens][:, tokens])
    assert torch.equal(permuted.permute(torch.argsort(order)).columns, topology.columns)


@pytest.mark.parametrize(
    ("order", "error"),
    [([0, 1, 2], ValueError), ([0, 1, 2, 2], ValueError), ([0, 1, 2, 4], ValueError), ([0.0, 1, 2, 3], TypeError)],
)
def test_permute_refuses_what_is_no_permutation(order: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="order must"):
        TokenTopology.from_faces(SQUARE).permute(order)


def test_locality_changes_the_schedule_only() -> None:
    faces = grid_faces(9, 11)
    shuffle = np.random.default_rng(0).permutation(99)
    natural, local = (TokenTopology.from_faces(shuffle[faces], num_hubs=3, order=o) for o in ("natural", "locality"))
    assert torch.equal(natural.mask(), local.mask()) and torch.equal(natural.columns, local.columns)
    assert sorted(local.locality_order().tolist()) == list(range(99))
    assert torch.equal(local.schedule.row_order[:99].long(), local.locality_order())
    assert local.schedule.mean < natural.schedule.mean, "fewer keys to gather"


@pytest.mark.parametrize("name", graphs())
def test_padded_groups_hold_the_lists(name: str) -> None:
    topology = topology_of(graphs()[name])
    assert sorted(topology.group_rows.tolist()) == list(range(topology.num_vertices))
    row = entry = 0
    for count, width in topology.groups:
        for vertex in topology.group_rows[row : row + count].tolist():
            entries = topology.group_entries[entry : entry + width]
            padding = topology.group_padding[entry : entry + width]
            first, last = topology.row_offsets[vertex : vertex + 2].tolist()
            assert entries[~padding].tolist() == list(range(first, last))
            assert (entries[padding] == last - 1).all() and 2 * (last - first) >= width
            entry += width
        row += count
    assert entry == len(topology.group_entries)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 64), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_random_masks_come_back(vertices: int, hubs: int, density: float, symmetric: bool, seed: int) -> None:
    mask = random_mask(vertices, hubs, density, symmetric, bool(seed % 2), seed)
    topology = TokenTopology.from_mask(mask)
    assert torch.equal(topology.mask(), mask)
    assert topology.degrees().sum() == topology.nnz == len(topology.rows())
    assert topology.max_degree == int(topology.degrees().max()) if topology.num_vertices else True


# ---- module ---------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A module that holds a topology."""

    def __init__(self, topology: TokenTopology) -> None:
        super().__init__()
        self.topology = topology
        self.scale = nn.Parameter(torch.ones(8))
        self.backend = "reference"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return topology_attention(x * self.scale, x, x, self.topology, backend=self.backend)


def buffers_equal(left: TokenTopology, right: TokenTopology) -> bool:
    pairs = zip(left.named_buffers(), right.named_buffers(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_state_dict_and_parameters_are_empty() -> None:
    layer = Layer(topology_of(graphs()["asymmetric"]))
    assert list(layer.state_dict()) == ["scale"]
    layer.load_state_dict({"scale": torch.zeros(8)})


@pytest.mark.parametrize("name", ["mesh", "asymmetric"])
def test_copies(name: str) -> None:
    topology = topology_of(graphs()[name], order="locality")
    file = io.BytesIO()
    torch.save(topology, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(topology)),
        copy.deepcopy(topology),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert buffers_equal(topology, other) and repr(other) == repr(topology)
        assert other.schedule.longest == topology.schedule.longest
        assert torch.equal(other.mask(), topology.mask())


def test_casts_leave_the_lists_alone() -> None:
    layer = Layer(topology_of(graphs()["mesh"])).half().double().to(torch.bfloat16)
    assert layer.topology.columns.dtype == torch.int32 and layer.scale.dtype == torch.bfloat16


def test_moves_between_devices(device: torch.device) -> None:
    topology = topology_of(graphs()["asymmetric"]).to(device)
    assert {buffer.device.type for buffer in topology.buffers()} == {device.type}
    assert topology.mask().device.type == topology.t_schedule.keys.device.type == device.type
    assert topology.permute(torch.arange(topology.num_vertices)).columns.device.type == device.type
    meta = copy.deepcopy(topology).to("meta")
    assert meta.columns.device.type == "meta"


@pytest.mark.parametrize("runner", FLOAT32_RUNNERS, ids=str)
def test_export(runner: Runner) -> None:
    layer = Layer(topology_of(graphs()["mesh"])).to(runner.device)
    layer.backend = runner.backend
    x = torch.randn(2, layer.topology.num_tokens, 2, 8, device=runner.device)
    program = torch.export.export(layer, (x,))
    ops = {str(node.target) for node in program.graph.nodes if "fastmetro_kernels" in str(node.target)}
    kernel = {f"fastmetro_kernels.attention_forward_{runner.backend}.default"}
    assert ops == (set() if runner.backend == "reference" else kernel), "the backend that was named is in the program"
    torch.testing.assert_close(program.module()(x), layer(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


def test_repr() -> None:
    topology = TokenTopology.from_faces(SQUARE, num_hubs=2)
    expected = "TokenTopology(num_hubs=2, num_vertices=4, nnz=14, symmetric=True, order='natural')"
    assert repr(topology) == expected
