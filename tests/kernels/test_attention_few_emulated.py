"""The CUDA kernels for few rows (`csrc/attention/few*.cuh`) in the emulator, which looks for races, against float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Graph, Result, assert_within_budget, keep_mask, oracle, plain, random_mask, topology_of
from emulation import build
from emulation.attention import EmulatedAttention, few_bytes
from torch import Tensor

from fastmetro_kernels.attention import native
from fastmetro_kernels.few import BLOCK_BYTES, build_few

if build.reasons():
    pytest.skip(f"kernels cannot be emulated: {'; '.join(build.reasons())}", allow_module_level=True)

SEED = 0x1234567890ABCDEF - 2**62


def _inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float16, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * tokens + dim)
    return [
        torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    ]


def _check(
    graph: Graph, inputs: list[Tensor], dropout_p: float = 0.0, scale: float | None = None, **options: object
) -> Result:
    """Forward, and for a symmetric pattern backward, of one call against the oracle; returns the results."""
    q, k, v = inputs
    batch, tokens, heads, dim = q.shape
    topology = topology_of(graph, order="locality")
    attention = EmulatedAttention(topology, **options)
    seed = torch.tensor([SEED]) if dropout_p else None
    factor = dim**-0.5 if scale is None else scale
    out, lse = attention.forward(q, k, v, factor, dropout_p, seed, few=True)
    generator = torch.Generator().manual_seed(7)
    grads = torch.randn(q.shape, generator=generator).to(q.dtype), torch.randn(lse.shape, generator=generator)
    if not topology.symmetric:
        grads = torch.zeros_like(q), torch.zeros_like(lse)  # nobody looks at what comes of them
    keep = keep_mask(SEED, batch, heads, tokens, dropout_p) if dropout_p else None
    exact = oracle([q, k, v], graph.mask, *grads, keep, dropout_p, scale)
    baseline = plain([q, k, v], graph.mask, *grads, scale)
    if keep is not None:  # what plain PyTorch gets wrong without dropout, carried over to numbers that are larger
        without = oracle([q, k, v], graph.mask, *grads, scale=scale)
        errors = (b.double() - w for b, w in zip(baseline, without, strict=True))
        baseline = Result(*(e + error / (1 - dropout_p) for e, error in zip(exact, errors, strict=True)))
    if not topology.symmetric:
        result = Result(out, lse, *exact[2:])
        assert_within_budget(result, exact, baseline)
        return result
    saved = exact[0].to(q.dtype), exact[1].float()
    dq, dk, dv = attention.backward(*grads, q, k, v, *saved, factor, dropout_p, seed, few=True)
    result = Result(out, lse, dq, dk, dv)
    assert_within_budget(result, exact, baseline)
    return result


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    """Head dims that fill a group of heads and that do not, five heads, a last block and window that are not full."""
    graph = Graph(random_mask(75, 14, 0.02, True, True, 5), 14, dim)
    _check(graph, _inputs(89, 5, dim, dtype, batch=1))


@pytest.mark.parametrize("hubs", [0, 1, 16, 33])
def test_hubs(hubs: int) -> None:
    """No tile of hubs, one, and several."""
    graph = Graph(random_mask(40, hubs, 0.01, True, True, 6), hubs, 64)
    _check(graph, _inputs(40 + hubs, 2, 64))


def test_more_keys_than_warps() -> None:
    """A warp of a hub tile goes on with the next 32 keys after those that all warps hold at once."""
    mask = torch.ones(563, 563, dtype=torch.bool)
    mask[3:, 3:] = torch.ones(560, 560, dtype=torch.bool).tril(1).triu(-1)
    _check(Graph(mask, 3, 16), _inputs(563, 4, 16, batch=1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_vertices_without_keys(symmetric: bool) -> None:
    """Rows that see nobody, and windows of such rows alone, get zeros."""
    mask = random_mask(70, 0, 0.03, symmetric, False, 7)
    mask[20:60] = False
    if symmetric:
        mask[:, 20:60] = False
    _check(Graph(mask, 0, 64), _inputs(70, 1, 64))


@pytest.mark.parametrize("dim", [16, 64])
def test_dropout(dim: int) -> None:
    """The same weights are dropped as by the rule."""
    graph = Graph(random_mask(60, 14, 0.02, True, True, 8), 14, dim)
    _check(graph, _inputs(74, 2, dim), dropout_p=0.4)


@pytest.mark.parametrize("scale", [-0.125, 0.0, 1e-60])
def test_explicit_scale_and_strides(scale: float) -> None:
    """Heads first in memory, keys and values shared by the batch. Masked keys count nothing, whatever the scale."""
    graph = Graph(random_mask(60, 5, 0.02, True, True, 8), 5, 64)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _inputs(65, 2, 64))
    _check(graph, [q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)], scale=scale)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_order_of_threads_does_not_matter(schedule: str) -> None:
    """Warps run in other orders; with a missing barrier results would differ."""
    graph = Graph(random_mask(70, 14, 0.015, True, True, 9), 14, 64)
    inputs = _inputs(84, 1, 64, batch=1)
    results = zip(_check(graph, inputs, schedule=schedule), _check(graph, inputs), strict=True)
    assert all(torch.equal(one, other) for one, other in results)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_shared_memory(kernel: str) -> None:
    """What `native.takes_few` believes that a block needs: as much as the kernel for heads of 64, the most of all."""
    assert native._FEW_SHARED_MEMORY[kernel] == max(few_bytes(kernel, dim) for dim in (16, 32, 64))


def test_pairs() -> None:
    """The bytes of a pair of windows, and none for lists of more than 64 keys."""
    graph = Graph(random_mask(82, 2, 0.02, True, True, 9), 2, 16)
    topology = topology_of(graph, order="locality")
    pairs = build_few(topology.schedule, 2)
    assert pairs is not None and pairs.shape == (3, BLOCK_BYTES)
    rows_seen = []
    for pair in pairs.numpy():
        chunks, rows = pair[:512].reshape(2, 256), pair[512:640].view("<i4").reshape(2, 16)
        row_slots, tokens, count = pair[640:672].reshape(2, 16), pair[672:1184].view("<i4"), pair[1184:1188].view("<i4")
        assert len(set(tokens[: count[0]].tolist())) == count[0]
        for window in range(2):
            slots = chunks[window, :128].view("<i2").reshape(16, 4).T.ravel()
            masks = chunks[window, 128:].view("<u8")
            for row, mask, slot in zip(rows[window], masks, row_slots[window], strict=True):
                if row < 0:
                    continue
                seen = [int(tokens[slots[n]]) for n in range(64) if int(mask) >> n & 1]
                assert sorted(seen) == graph.mask[row].nonzero().ravel().tolist() and tokens[slot] == row
                rows_seen.append(int(row))
    assert sorted(rows_seen) == list(range(2, 84))
    dense = Graph(torch.ones(80, 80, dtype=torch.bool), 0, 16)
    assert build_few(topology_of(dense).schedule, 0) is None
