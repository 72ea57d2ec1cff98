"""The CUDA attention kernels, thread by thread in the emulator: right without a GPU, free of races, whatever the order.

Results are held against the float64 oracle with the budget of plain PyTorch in the same dtype, as on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    Graph,
    Result,
    assert_within_budget,
    graphs,
    grid_faces,
    keep_mask,
    oracle,
    plain,
    random_mask,
    topology_of,
)
from emulation import build
from emulation.attention import EmulatedAttention
from torch import Tensor

from fastmetro_kernels import TokenTopology
from fastmetro_kernels.attention.native import shared_memory

if build.reasons():
    pytest.skip(f"kernels cannot be emulated: {'; '.join(build.reasons())}", allow_module_level=True)

SEED = 0x1234567890ABCDEF - 2**62


def _inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * tokens + dim)
    return [
        torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)
    ]


def _check(
    graph: Graph,
    inputs: list[Tensor],
    steps_per_segment: int = 0,
    dropout_p: float = 0.0,
    order: str = "natural",
    scale: float | None = None,
    **options: object,
) -> EmulatedAttention:
    """Outputs and gradients of one call against the oracle."""
    q, k, v, grad = inputs
    batch, tokens, heads, dim = q.shape
    attention = EmulatedAttention(topology_of(graph, order=order), steps_per_segment, **options)
    seed = torch.tensor([SEED]) if dropout_p else None
    factor = dim**-0.5 if scale is None else scale
    grad_lse = torch.randn(batch, heads, tokens, generator=torch.Generator().manual_seed(7))
    grad_lse = grad_lse.masked_fill(~graph.mask.any(1), 0.0)
    out, lse = attention.forward(q, k, v, factor, dropout_p, seed)
    grads = attention.backward(grad, grad_lse, q, k, v, out, lse, factor, dropout_p, seed)
    keep = keep_mask(SEED, batch, heads, tokens, dropout_p) if dropout_p else None
    exact = oracle([q, k, v], graph.mask, grad, grad_lse, keep, dropout_p, scale)
    baseline = plain([q, k, v], graph.mask, grad, grad_lse, scale)
    if keep is not None:  # what plain PyTorch gets wrong without dropout, carried over to numbers that are larger
        without = oracle([q, k, v], graph.mask, grad, grad_lse, scale=scale)
        errors = (b.double() - w for b, w in zip(baseline, without, strict=True))
        baseline = Result(*(e + error / (1 - dropout_p) for e, error in zip(exact, errors, strict=True)))
    assert_within_budget(Result(out, lse, *grads), exact, baseline)
    return attention


@pytest.mark.parametrize("name", [name for name in graphs() if name != "hubs_only"])
def test_graphs(name: str) -> None:
    """Every kind of topology, and head dims that fill a group of heads and that do not."""
    graph = graphs()[name]
    _check(graph, _inputs(len(graph.mask), 3, graph.head_dim, torch.float16))


def test_hubs_alone() -> None:
    """A topology without vertices has no window, but its hubs meet."""
    graph = Graph(torch.ones(6, 6, dtype=torch.bool), 6, 16)
    _check(graph, _inputs(6, 2, 16, torch.float16))


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    """Several steps, several segments, a last window that is not full, five heads."""
    graph = Graph(random_mask(151, 14, 0.02, True, True, 5), 14, dim)
    _check(graph, _inputs(165, 5, dim, dtype, batch=1), steps_per_segment=1, order="locality")


@pytest.mark.parametrize("steps_per_segment", [0, 1, 2])
@pytest.mark.parametrize("hubs", [0, 1, 16])
def test_segments(steps_per_segment: int, hubs: int) -> None:
    """One block or several walk over the mesh; hub rows are added up over them."""
    graph = Graph(random_mask(200, hubs, 0.015, True, True, 6), hubs, 64)
    _check(graph, _inputs(200 + hubs, 1, 64, torch.float16), steps_per_segment)


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_clusters(dim: int) -> None:
    """The segments of a batch element combine their hub rows in shared memory."""
    graph = Graph(random_mask(250, 14, 0.01, True, True, 6), 14, dim)
    attention = _check(graph, _inputs(264, 2, dim, torch.float16), steps_per_segment=1, clusters=True)
    assert all(plan.segments > 1 for plan in attention.plans.values())
    assert all(statistics.cluster_reads > 0 for statistics in attention.statistics)


@pytest.mark.parametrize("dim", [16, 64])
def test_dropout(dim: int) -> None:
    """The same weights are dropped as by the rule, in every pass and segment, with more than 64 keys in a list."""
    graph = Graph(random_mask(90, 14, 0.08, False, True, 8), 14, dim)
    _check(graph, _inputs(104, 2, dim, torch.float16), steps_per_segment=1, dropout_p=0.4)


@pytest.mark.parametrize("dim", [8, 16, 24, 32])
@pytest.mark.parametrize("hubs", [0, 14, 40])
def test_narrow_groups(dim: int, hubs: int) -> None:
    """A block has half as many heads and walks over the whole mesh; three heads leave a group that is not full."""
    graph = Graph(random_mask(190, hubs, 0.02, True, True, 5), hubs, dim)
    inputs = _inputs(190 + hubs, 3, dim, torch.float16 if dim < 32 else torch.bfloat16, batch=1)
    attention = _check(graph, inputs, narrow=True, windows=5)
    assert all(plan.segments == 1 and plan.steps_count > 1 for plan in attention.plans.values())
    assert all(plan.slots == 190 + hubs for plan in attention.plans.values())


@pytest.mark.parametrize("dim", [16, 32])
def test_narrow_groups_with_dropout(dim: int) -> None:
    """Asymmetric, some lists longer than 64 keys, as many windows per step as there may be."""
    graph = Graph(random_mask(90, 14, 0.08, False, True, 8), 14, dim)
    _check(graph, _inputs(104, 3, dim, torch.float16), dropout_p=0.4, narrow=True)


@pytest.mark.parametrize("name", ["64_hubs", "17_hubs", "isolated_without_hubs", "hubs_only", "one_vertex"])
def test_narrow_groups_of_other_graphs(name: str) -> None:
    """Several tiles of hubs, vertices that see nothing, no window."""
    graph = graphs()[name]
    _check(graph, _inputs(len(graph.mask), 4, 16, torch.float16), narrow=True)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_order_of_threads_does_not_matter(schedule: str, narrow: bool) -> None:
    """Warps run in other orders; with a missing barrier results would differ."""
    graph = Graph(random_mask(150, 14, 0.02, True, True, 9), 14, 64)
    inputs = _inputs(164, 1, 16 if narrow else 64, torch.float16, batch=1)
    windows = 4 if narrow else None
    first = EmulatedAttention(topology_of(graph), narrow=narrow, windows=windows)
    second = EmulatedAttention(topology_of(graph), narrow=narrow, windows=windows, schedule=schedule, seed=3)
    q, k, v, grad = inputs
    results = []
    for attention in (first, second):
        out, lse = attention.forward(q, k, v, 0.125)
        results.append((out, lse, *attention.backward(grad, None, q, k, v, out, lse, 0.125)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strides_and_shared_tokens() -> None:
    """Inputs with a batch stride of 0 and heads before tokens, and a negative scale."""
    graph = graphs()["17_hubs"]
    tokens = len(graph.mask)
    q, k, v, _ = _inputs(tokens, 2, 64, torch.float16, batch=3)
    views = [q[:1].expand_as(q), k.transpose(1, 2).contiguous().transpose(1, 2), v.flip(0)[:].clone()]
    attention = EmulatedAttention(topology_of(graph))
    out, lse = attention.forward(*views, -0.3)
    expected, expected_lse = attention.forward(*(x.contiguous() for x in views), -0.3)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    scores = torch.einsum("bihd,bjhd->bhij", views[0].double(), views[1].double()) * -0.3
    exact = torch.logsumexp(scores.masked_fill(~graph.mask, -torch.inf), -1)
    assert (lse - exact).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-60])
@pytest.mark.parametrize("narrow", [False, True])
def test_explicit_scale(narrow: bool, scale: float) -> None:
    """Masked keys count nothing, whatever the scale: 0, too, and what is 0 in float32."""
    graph = graphs()["asymmetric"]
    _check(graph, _inputs(len(graph.mask), 2, 16, torch.float16), scale=scale, narrow=narrow)
    if not narrow:  # rows that see nobody, lists beyond a chunk, hub rows in segments
        _check(graphs()["isolated_without_hubs"], _inputs(21, 2, 16, torch.float16), scale=scale)
        dense = Graph(random_mask(90, 3, 0.5, True, True, 3), 3, 64)
        _check(dense, _inputs(93, 1, 64, torch.float16), 1, dropout_p=0.3, scale=scale)


def test_few_bank_conflicts() -> None:
    """Lists are ordered so that most reads of eight rows need no second pass."""
    topology = TokenTopology.from_faces(grid_faces(20, 21), num_hubs=14)
    attention = EmulatedAttention(topology)
    q, k, v, _ = _inputs(topology.num_tokens, 1, 64, torch.float16, batch=1)
    attention.forward(q, k, v, 0.125)
    assert attention.statistics[0].conflict_rate < 0.2
    attention = EmulatedAttention(topology, narrow=True)
    q, k, v, grad = _inputs(topology.num_tokens, 2, 16, torch.float16, batch=1)
    out, lse = attention.forward(q, k, v, 0.25)
    attention.backward(grad, None, q, k, v, out, lse, 0.25)
    assert all(statistics.conflict_rate < 0.25 for statistics in attention.statistics)


@pytest.mark.parametrize(("dim", "narrow"), [(16, False), (16, True), (32, True), (64, False), (128, False)])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_shared_memory_is_what_python_says(kernel: str, dim: int, narrow: bool) -> None:
    """A block with dropout needs all the bytes by which `auto` decides whether a device has room, and no more."""
    graph = Graph(random_mask(60, 14, 0.05, True, True, 3), 14, dim)
    q, k, v, grad = _inputs(74, 2, dim, torch.float16, batch=1)
    seed = torch.tensor([SEED])

    def run(limit: int) -> None:
        attention = EmulatedAttention(topology_of(graph), narrow=narrow, shared_limit=limit)
        if kernel == "forward":
            attention.forward(q, k, v, 0.125, 0.3, seed)
        else:
            lse = torch.zeros(1, 2, 74)
            attention.backward(grad, None, q, k, v, v, lse, 0.125, 0.3, seed)

    name = kernel if kernel == "backward" or dim > 32 else "forward_narrow"
    plan = EmulatedAttention(topology_of(graph), narrow=narrow).packed[name]
    needed = shared_memory(plan, 2 if kernel == "forward" else 4, dim, narrow)
    run(needed)
    with pytest.raises(build.EmulationError, match="shared memory"):
        run(needed - 1)
