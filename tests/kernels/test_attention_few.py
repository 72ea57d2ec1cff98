"""On a GPU: the kernels for few rows and the streaming ones, whichever of them `auto` would take."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Result, assert_within_budget, graphs, grid_faces, oracle, plain, topology_of

from fastmetro_kernels import TokenTopology
from fastmetro_kernels.attention import native

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WHOLE_MESH = 1 << 20  # steps per segment: anything but 0 asks for the streaming kernel


@needs_gpu
@pytest.mark.parametrize("segment", [0, 1, WHOLE_MESH])
@pytest.mark.parametrize("name", sorted(graphs()))
def test_both_passes(name: str, segment: int) -> None:
    """Every kind of topology against float64."""
    graph = graphs()[name]
    topology = topology_of(graph, "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (1, len(graph.mask), 3, graph.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").half() for _ in range(3))
    if missing := native.reasons(q, k, v, topology):
        pytest.skip("; ".join(missing))
    out, lse = native.forward(q, k, v, topology, graph.head_dim**-0.5, 0.0, None, segment)
    grad, grad_lse = torch.randn(shape, generator=generator, device="cuda").half(), torch.randn_like(lse)
    exact = oracle([q, k, v], graph.mask, grad, grad_lse)
    saved = exact[0].to(q), exact[1].to(lse)
    grads = native.backward(
        grad, grad_lse, q, k, v, *saved, topology, graph.head_dim**-0.5, 0.0, None, segment
    )  # fmt: skip
    assert_within_budget(Result(out, lse, *grads), exact, plain([q, k, v], graph.mask, grad, grad_lse))


@needs_gpu
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_which_kernel(kernel: str) -> None:
    """The one for few rows is taken while its blocks find a multiprocessor each, and never for wide heads."""
    faces = grid_faces(20, 20)
    topology = TokenTopology.from_faces(faces, num_hubs=14).cuda()

    def taken(batch: int, dim: int) -> bool:
        return native.takes_few(kernel, torch.empty(batch, topology.num_tokens, 8, dim, device="cuda").half(), topology)

    many = torch.cuda.get_device_properties("cuda").multi_processor_count
    assert taken(1, 64) and taken(1, 8)
    assert not taken(many, 64) and not taken(1, 128)


@needs_gpu
def test_asymmetric_pattern() -> None:
    """Its backward is not for the kernel for few rows, which has one list for both roles."""
    topology = topology_of(graphs()["asymmetric"], "cuda")
    q = torch.empty(1, topology.num_tokens, 8, 64, device="cuda").half()
    assert native.takes_few("forward", q, topology) and not native.takes_few("backward", q, topology)


@needs_gpu
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_few_rows_replayed(kernel: str) -> None:
    """A kernel that starts early must wait for the one before it: each call of a chain reads what the last wrote."""
    topology = TokenTopology.from_faces(grid_faces(20, 20), num_hubs=14).cuda()
    q, k, first = (torch.randn(1, topology.num_tokens, 8, 64, device="cuda").half() for _ in range(3))
    assert native.takes_few(kernel, q, topology)
    out, lse = native.forward(q, k, first, topology, 0.125, 0.0, None)

    def call(x: torch.Tensor) -> torch.Tensor:
        if kernel == "forward":
            return native.forward(q, k, x, topology, 0.125, 0.0, None)[0]
        return native.backward(x, None, q, k, first, out, lse, topology, 0.125, 0.0, None)[2]

    def chain() -> torch.Tensor:
        x = first
        for _ in range(50):
            x = call(x)
        return x

    expected = first
    for _ in range(50):
        expected = call(expected)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(20):
        got.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, expected)
