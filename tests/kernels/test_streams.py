"""The tables of the streaming kernel: a block at a time in NumPy, as the kernel walks through them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from test_upsampling import mesh_like_matrix, random_matrix

from fastmetro_kernels.streams import LANES, NO_ROW, NOTHING, Cut, build_streams, parts_of

MATRICES = {
    "three-per-row": random_matrix(131, 61, 3).to_scipy(),
    "uneven": random_matrix(131, 61, (0, 9)).to_scipy(),
    "long": random_matrix(40, 90, (20, 60)).to_scipy(),
    "mesh": mesh_like_matrix(600, 151).to_scipy(),
    "mesh, transposed": sp.csr_array(mesh_like_matrix(600, 151).to_scipy().T),
}


def product(csr: sp.csr_array, words: np.ndarray, cut: Cut, x: np.ndarray) -> np.ndarray:
    """``csr @ x`` from the tables of a cut; rows that nobody writes stay NaN."""
    threes, parts = bool((np.diff(csr.indptr) == 3).all()), parts_of(csr.nnz, csr.shape[0])
    warps = cut.threads // LANES
    out = np.full((csr.shape[0], x.shape[1]), np.nan)
    for block in range(cut.blocks):
        table = words[cut.offset + block * cut.block_words :][: cut.block_words].view(np.uint32)
        used, ends, starts = table[1 : 1 + 3 * warps].reshape(3, warps)
        listed = table[1 + 3 * warps :][: cut.tokens]
        listed = listed[listed != NOTHING]
        stage = np.full((cut.places + 1, x.shape[1]), np.nan)
        stage[cut.places] = 0.0
        stage[listed >> 16] = x[listed & 0xFFFF]
        assert len(np.unique(listed >> 16)) == len(listed) and (listed >> 16).max() < cut.places
        for warp in range(warps):
            both = table[starts[warp] :][: 2 * used[warp] * LANES].reshape(2, used[warp], LANES)
            entries, values = both[0], both[1].view(np.float32)
            sums, tasks = np.zeros((LANES, x.shape[1])), 0
            for slot in range(used[warp]):
                sums += values[slot, :, None] * stage[entries[slot] & 0xFFFF]
                if not ends[warp] >> slot & 1:
                    continue
                if threes:
                    first = block * cut.block_rows + (warp * cut.slots // 3 + tasks) * LANES
                    rows = first + np.arange(LANES)
                    kept = rows < block * cut.block_rows + table[0]
                else:
                    own = entries[slot] >> 16
                    kept = (own != NO_ROW) & (np.arange(LANES) % parts == 0)
                    rows = table[1 + 3 * warps + cut.tokens :][np.where(kept, own, 0)]
                    sums = np.repeat(sums.reshape(-1, parts, x.shape[1]).sum(1), parts, axis=0)
                assert np.isnan(out[rows[kept]]).all(), "a row is written twice"
                out[rows[kept]] = sums[kept]
                sums, tasks = np.zeros_like(sums), tasks + 1
    return out


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("size", [(1, 3), (2, 6), (5, 9), (4, 27)])
def test_tables_give_the_product(name: str, size: tuple[int, int]) -> None:
    csr = MATRICES[name]
    words, sizes = build_streams(csr, [size])
    if not sizes:
        assert size[0] * size[1] < 36, "so many threads hold every one of these matrices"
        return
    x = np.random.default_rng(0).standard_normal((csr.shape[1], 2))
    np.testing.assert_allclose(product(csr, words, Cut(*sizes), x), csr @ x, rtol=1e-5, atol=1e-5)


def test_several_cuts_share_an_array() -> None:
    csr = MATRICES["mesh"]
    words, sizes = build_streams(csr, [(2, 9), (5, 9)])
    x = np.random.default_rng(0).standard_normal((csr.shape[1], 1))
    cuts = [Cut(*sizes[start : start + len(Cut._fields)]) for start in range(0, len(sizes), len(Cut._fields))]
    assert [cut.blocks for cut in cuts] == [2, 5]
    for cut in cuts:
        np.testing.assert_allclose(product(csr, words, cut, x), csr @ x, rtol=1e-5, atol=1e-5)


def test_what_has_no_stream() -> None:
    for csr in (random_matrix(40, 30, 3), random_matrix(300, 300, 3)):  # too small; too much for the registers
        matrix = csr.to_scipy()
        default = build_streams(matrix)
        assert matrix.shape[0] > 256 or (len(default[0]), default[1]) == (0, [])
    assert build_streams(random_matrix(3000, 40, 20).to_scipy(), [(1, 3)])[1] == []
    assert build_streams(sp.csr_array((300, 300)), [(1, 3)])[1] == []
    wide = sp.csr_array((np.ones(900), (np.repeat(np.arange(300), 3), np.arange(900) * 100)), shape=(300, 90_000))
    assert build_streams(wide)[1] == []


def test_places_meet_rarely_in_a_bank() -> None:
    """On the grid of a mesh most reads of a warp find all their tokens in different banks."""
    csr = mesh_like_matrix(1728, 432).to_scipy()
    words, sizes = build_streams(csr, [(1, 27)])
    cut = Cut(*sizes)
    table = words[cut.offset :][: cut.block_words].view(np.uint32)
    start = 1 + 3 * 27 + cut.tokens
    entries = table[start:].reshape(27, 2, cut.slots, LANES)[:, 0].reshape(-1, LANES) & 0xFFFF
    passes = [np.bincount(np.unique(read) % LANES).max() for read in entries]
    assert np.mean(passes) < 1.5
