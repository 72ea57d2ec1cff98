"""Blocks that walk over a small mesh alone: when they are chosen, and on a GPU that they are right.

Thread by thread they run in `test_attention_emulated.py`.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import Graph, Result, assert_within_budget, oracle, plain, random_mask, topology_of

from fastmetro_kernels.attention import native
from fastmetro_kernels.attention.native import fills_device


@pytest.mark.parametrize(
    ("batch", "heads", "dim", "chosen"),
    [
        (32, 8, 16, True),  # 128 blocks for 132 multiprocessors
        (33, 8, 16, True),
        (34, 8, 16, False),  # some multiprocessors would have two
        (16, 8, 16, False),  # half of them would have none
        (17, 8, 16, True),
        (44, 5, 8, True),  # three groups of two heads, the last with one
        (45, 5, 8, False),
        (16, 8, 32, True),
        (16, 8, 24, True),
        (17, 8, 32, False),
        (16, 8, 40, False),  # no head fits into 64 bytes
        (1, 8, 16, False),
    ],
)
def test_when_a_block_per_multiprocessor_is_chosen(batch: int, heads: int, dim: int, chosen: bool) -> None:
    """There are enough blocks for most multiprocessors, and not more than one for each."""
    assert fills_device(batch, heads, dim, 132) == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hubs", [0, 14, 40])
@pytest.mark.parametrize("dim", [16, 24, 32])
def test_as_many_blocks_as_multiprocessors(dim: int, hubs: int) -> None:
    """Results and gradients, the same bits twice."""
    heads = 3
    places = torch.cuda.get_device_properties("cuda").multi_processor_count
    batch = places // (2 if dim <= 16 else heads)
    assert fills_device(batch, heads, dim, places)
    graph = Graph(random_mask(260, hubs, 0.01, True, True, 5), hubs, dim)
    topology = topology_of(graph, "cuda")
    tokens = topology.num_tokens
    generator = torch.Generator().manual_seed(dim + hubs)
    shape = (batch, tokens, heads, dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to("cuda", torch.float16) for _ in range(4))
    grad_lse = torch.randn(batch, heads, tokens, generator=generator)
    grad_lse = grad_lse.masked_fill(~graph.mask.any(1), 0.0).to("cuda")
    assert not native.reasons(q, k, v, topology)

    def run() -> Result:
        out, lse = native.forward(q, k, v, topology, dim**-0.5, 0.0, None)
        return Result(out, lse, *native.backward(grad, grad_lse, q, k, v, out, lse, topology, dim**-0.5, 0.0, None))

    found = run()
    mask = graph.mask.cuda()
    exact = oracle([q, k, v], mask, grad, grad_lse)
    assert_within_budget(found, exact, plain([q, k, v], mask, grad, grad_lse))
    assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))
