"""The tables of the bulk kernel: a block at a time in NumPy, as the kernel walks through them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from test_streams import MATRICES
from test_upsampling import mesh_like_matrix

from fastmetro_kernels.bulk import HEADER, MASKS, NO_ROW, NONE, PAD, POINT, SEGMENTS, _colors, build_bulk, build_tables
from fastmetro_kernels.streams import LANES, Cut, build_streams


def product(csr: sp.csr_array, words: np.ndarray, cut: Cut, x: np.ndarray) -> np.ndarray:
    """``csr @ x`` for points x from the tables of a cut; rows that nobody writes stay NaN."""
    warps = cut.threads // LANES
    out = np.full((csr.shape[0], POINT), np.nan)
    for block in range(cut.blocks):
        table = words[cut.offset + block * cut.block_words :][: cut.block_words].view(np.uint32)
        begin, rows, segments, head, tail = table[:HEADER].astype(np.int64)
        first, tokens, place = table[HEADER:][: 3 * SEGMENTS].reshape(3, SEGMENTS)[:, :segments].astype(np.int64)
        stage = np.full(cut.places + LANES + POINT, np.nan)
        stage[cut.places :] = 0.0
        padded = np.pad(x, ((0, 8), (0, 0)), constant_values=np.nan)
        for start, count, to in zip(first, tokens, place, strict=True):
            assert start % 8 == 0 and count % 8 == 0
            stage[to : to + POINT * count] = padded[start : start + count].ravel()
            assert to + POINT * count + PAD <= cut.places
        assert head == (place[0] if first[0] == 0 else NONE)
        if tail != NONE:
            assert stage[tail] == x[-1, -1]
        own = table[HEADER + 3 * SEGMENTS :]
        used, starts, *masks = own[: (2 + MASKS) * warps].reshape(2 + MASKS, warps).astype(np.int64)
        for warp in range(warps):
            both = table[starts[warp] :][: 2 * used[warp] * LANES].reshape(2, used[warp], LANES)
            sums = np.zeros((LANES, POINT))
            for slot in range(used[warp]):
                item, row = both[0, slot] >> 16, both[0, slot] & NO_ROW
                sums += both[1, slot].view(np.float32)[:, None] * stage[item[:, None] + np.arange(POINT)]
                if not masks[0][warp] >> slot & 1:
                    continue
                lanes = 1 << sum(int(mask[warp]) >> slot & 1 for mask in masks[1:])
                sums = np.repeat(sums.reshape(-1, lanes, POINT).sum(1), lanes, axis=0)
                kept = row != NO_ROW
                assert np.isnan(out[begin + row[kept]]).all(), "a row is written twice"
                assert (row[kept] < rows).all()
                out[begin + row[kept]] = sums[kept]
                sums = np.zeros_like(sums)
    return out


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("size", [(1, 3), (2, 6), (5, 9), (4, 18)])
def test_tables_give_the_product(name: str, size: tuple[int, int]) -> None:
    csr = MATRICES[name]
    words, sizes = build_bulk(csr, [size])
    if not sizes:
        assert size[0] * size[1] < 36, "so many threads hold every one of these matrices"
        return
    x = np.random.default_rng(0).standard_normal((csr.shape[1], POINT))
    np.testing.assert_allclose(product(csr, words, Cut(*sizes), x), csr @ x, rtol=1e-5, atol=1e-5)


def test_both_kinds_of_cut_share_an_array() -> None:
    csr = sp.csr_array(mesh_like_matrix(1728, 432).to_scipy().T)  # rows of three entries are only streamed
    words, sizes = build_tables(csr)
    width = len(Cut._fields)
    cuts = [Cut(*sizes[start : start + width]) for start in range(0, len(sizes), width)]
    kinds = [cut.kind for cut in cuts]
    assert set(kinds) == {0, 1, 2} and kinds == sorted(kinds, reverse=True)
    x = np.random.default_rng(0).standard_normal((csr.shape[1], POINT))
    for cut in cuts:
        if cut.kind == 1:
            np.testing.assert_allclose(product(csr, words, cut, x), csr @ x, rtol=1e-5, atol=1e-5)
    streams, stream_sizes = build_streams(csr)
    np.testing.assert_array_equal(words[len(words) - len(streams) :], streams)
    assert len(stream_sizes) == width * kinds.count(0)


def test_lanes_rarely_meet_in_a_bank() -> None:
    csr = mesh_like_matrix(1728, 432).to_scipy()
    for matrix, limit in ((csr, 1.25), (sp.csr_array(csr.T), 2.0)):
        words, sizes = build_bulk(matrix, [(1, 18)])
        cut = Cut(*sizes)
        table = words[: cut.block_words].view(np.uint32)
        used, starts = table[HEADER + 3 * SEGMENTS :][: 2 * 18].reshape(2, 18).astype(np.int64)
        reads = [table[begin:][: LANES * count].reshape(-1, LANES) for begin, count in np.stack([starts, used], 1)]
        passes = [np.bincount(np.unique(read >> 16) % LANES).max() for read in np.concatenate(reads)]
        assert np.mean(passes) < limit


def test_what_has_no_bulk_copies() -> None:
    assert build_bulk(mesh_like_matrix(200, 60).to_scipy())[1] == []  # small
    assert build_bulk(sp.csr_array((300, 300)), [(1, 3)])[1] == []
    assert build_bulk(mesh_like_matrix(3000, 750).to_scipy(), [(1, 1)])[1] == []  # too much for the registers
    wide = sp.csr_array((np.ones(900), (np.repeat(np.arange(300), 3), np.arange(900) * 100)), shape=(300, 90_000))
    assert build_bulk(wide)[1] == []


@pytest.mark.parametrize("count", [1, 4, 11])
def test_colors_differ_at_every_lane_and_bank(count: int) -> None:
    rng = np.random.default_rng(count)
    lanes = np.repeat(np.arange(LANES), count)
    banks = np.concatenate([rng.permutation(LANES) for _ in range(count)])
    order = rng.permutation(len(lanes))
    lanes, banks = lanes[order], banks[order]
    for ends in (lanes, banks):
        assert len(np.unique(ends * count + _colors(lanes, banks, count))) == len(lanes)
    full = rng.integers(0, 3, len(lanes))  # then banks have more than there are colors
    assert len(np.unique(lanes * count + _colors(lanes, full, count))) == len(lanes)
