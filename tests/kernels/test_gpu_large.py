"""On a GPU: a mesh of more than 200,000 vertices, forward and backward, by every backend that takes it."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_cases import grid_faces

from fastmetro_kernels import TokenTopology, topology_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIDE = 448
HEADS, HUBS = 4, 14
WORSE = 3.0  # than plain PyTorch in the same precision, relative errors in the norm


@functools.cache
def topology() -> TokenTopology:
    """Of a square of 448 x 448 vertices."""
    return TokenTopology.from_faces(grid_faces(SIDE, SIDE), num_hubs=HUBS).cuda()


def results(inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = topology_attention(q, k, v, topology(), backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].to(out))]


@pytest.mark.parametrize("dim", [16, 64])
def test_more_than_200_000_vertices(dim: int) -> None:
    """Against the reference in float64, with the error of the reference in float16 as a yardstick."""
    mesh = topology()
    assert mesh.num_vertices > 200_000
    generator = torch.Generator("cuda").manual_seed(dim)
    shape = (1, mesh.num_tokens, HEADS, dim)
    inputs = [torch.randn(shape, generator=generator, device="cuda").half() for _ in range(4)]
    exact = results([x.double() for x in inputs], "reference")
    plain = results(inputs, "reference")
    for backend in ("native", "triton"):
        for got, yardstick, want in zip(results(inputs, backend), plain, exact, strict=True):
            error, allowed = (got - want).norm() / want.norm(), (yardstick - want).norm() / want.norm()
            assert error <= WORSE * allowed, f"{backend}: {error:.1e}, plain PyTorch {allowed:.1e}"
            rows = (got[:, :HUBS] - want[:, :HUBS]).norm() / want[:, :HUBS].norm()  # lost in the sum over all rows
            assert rows <= WORSE * max(allowed, 1e-3), f"{backend}, hubs: {rows:.1e}"
