"""The tables of the kernel for points: a block at a time in NumPy, as the kernel walks through them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from test_upsampling import mesh_like_matrix, random_matrix

from fastmetro_kernels.points import LANES, NO_ROW, POINT, ROWS, ZEROS, Cut, _phase, build_points

MATRICES = {
    "three-per-row": random_matrix(131, 61, 3).to_scipy(),
    "at most three per row": random_matrix(131, 61, (1, 3)).to_scipy(),
    "uneven": random_matrix(131, 61, (0, 9)).to_scipy(),
    "long": random_matrix(40, 90, (6, 50)).to_scipy(),
    "mesh": mesh_like_matrix(600, 151).to_scipy(),
    "mesh, transposed": sp.csr_array(mesh_like_matrix(600, 151).to_scipy().T),
}


def has_threes(csr: sp.csr_array) -> bool:
    return csr.nnz >= 2 * csr.shape[0] and np.diff(csr.indptr).max() <= 3


def tables(words: np.ndarray, cut: Cut, threes: bool) -> list[tuple[np.ndarray, ...]]:
    """Of each block: slots used, lanes per position and rows of each warp; tokens; [warps, 2, slots, rows] entries."""
    warps, rows, found = cut.threads // LANES, ROWS[threes], []
    for block in range(cut.blocks):
        table = words[cut.offset + block * cut.block_words :][: cut.block_words].view(np.uint32)
        head = 1 if threes else 1 + warps * (1 + rows)
        used = np.full(warps, 3 | 1 << 8) if threes else table[1 : 1 + warps]
        if threes:
            first = block * cut.block_rows
            own = first + np.arange(warps * rows).reshape(warps, rows)
            own[own >= first + cut.block_rows] = NO_ROW
        else:
            own = table[1 + warps :][: warps * rows].reshape(warps, rows).astype(np.int64)
        tokens = table[head:][: table[0]]
        entries = table[head + cut.places :][: 2 * warps * cut.slots * rows].reshape(warps, 2, cut.slots, rows)
        found.append((used & 0xFF, used >> 8, own, tokens, entries))
    return found


def product(csr: sp.csr_array, words: np.ndarray, cut: Cut, x: np.ndarray) -> np.ndarray:
    """``csr @ x`` from the tables of a cut; rows that nobody writes stay NaN."""
    threes = has_threes(csr)
    out = np.full((csr.shape[0], x.shape[1]), np.nan)
    for used, splits, own, tokens, entries in tables(words, cut, threes):
        assert len(tokens) % LANES == 0 and len(tokens) <= cut.places
        stage = np.full((cut.places + ZEROS, x.shape[1]), np.nan)
        stage[: len(tokens)] = x[tokens]
        stage[cut.places :] = 0.0
        for warp, split in enumerate(splits):
            mine = slice(0, used[warp])
            assert not entries[warp, 1, used[warp] :].any() and not (entries[warp, 0] % POINT).any()
            values = entries[warp, 1, mine].view(np.float32)
            sums = (values[..., None] * stage[entries[warp, 0, mine] // POINT]).sum(0)
            rows = ROWS[threes] // split
            sums = sums[: split * rows].reshape(split, rows, -1).sum(0)
            kept = (own[warp, :rows] != NO_ROW) & (own[warp, :rows] < csr.shape[0])
            assert (own[warp, rows:] == NO_ROW).all()
            assert np.isnan(out[own[warp, :rows][kept]]).all(), "a row is written twice"
            out[own[warp, :rows][kept]] = sums[kept]
    return out


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("size", [(1, 3), (2, 8), (5, 9), (4, 20)])
def test_tables_give_the_product(name: str, size: tuple[int, int]) -> None:
    csr = MATRICES[name]
    words, sizes = build_points(csr, [size])
    if not sizes:
        assert size[0] * size[1] < 45, "so many threads hold every one of these matrices"
        return
    x = np.random.default_rng(0).standard_normal((csr.shape[1], 2))
    np.testing.assert_allclose(product(csr, words, Cut(*sizes), x), csr @ x, rtol=1e-5, atol=1e-5)


def test_several_cuts_share_an_array() -> None:
    csr = MATRICES["mesh"]
    words, sizes = build_points(csr, [(2, 12), (5, 9)])
    x = np.random.default_rng(0).standard_normal((csr.shape[1], 1))
    cuts = [Cut(*sizes[start : start + len(Cut._fields)]) for start in range(0, len(sizes), len(Cut._fields))]
    assert [cut.blocks for cut in cuts] == [2, 5]
    for cut in cuts:
        np.testing.assert_allclose(product(csr, words, cut, x), csr @ x, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_cut() -> None:
    assert build_points(random_matrix(40, 30, 3).to_scipy())[1] == []  # small
    assert build_points(sp.csr_array((300, 300)), [(1, 3)])[1] == []
    assert build_points(sp.csr_array(np.ones((300, 65))), [(20, 20)])[1] == []  # rows of more than 64 entries
    assert build_points(mesh_like_matrix(3000, 750).to_scipy(), [(1, 20)])[1] == []  # too much for the registers
    assert build_points(random_matrix(1, 40, 40).to_scipy(), [(1, 3)])[1] == []  # a whole warp shares a row


def test_lanes_rarely_meet_in_a_bank() -> None:
    """Of 8 lanes that are served at a time; one pass is the least."""
    csr = mesh_like_matrix(1728, 432).to_scipy()
    for matrix, size, limit in ((csr, (2, 27), 1.25), (sp.csr_array(csr.T), (4, 20), 1.45)):
        words, sizes = build_points(matrix, [size])
        threes, cut = has_threes(matrix), Cut(*sizes)
        position = np.arange(POINT * ROWS[threes])
        passes = []
        for used, _, _, _, entries in tables(words, cut, threes):
            for warp, slots in enumerate(used):
                for slot in range(slots):
                    word = entries[warp, 0, slot][position // POINT].astype(np.int64) + position % POINT
                    for phase in range(int(_phase(position).max()) + 1):
                        passes.append(np.bincount(np.unique(word[_phase(position) == phase]) % 8).max())
        assert np.mean(passes) < limit
