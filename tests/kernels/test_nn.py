"""The layers: a drop-in for nn.MultiheadAttention, and the upsampling module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import FLOAT32_RUNNERS, Runner, graphs, topology_of
from torch import Tensor, nn

from fastmetro_kernels.nn import SparseUpsample, TopologyAttention

float32_runner = pytest.mark.parametrize("runner", FLOAT32_RUNNERS, ids=str)


@pytest.mark.parametrize("bias", [True, False])
@float32_runner
def test_layer_is_a_drop_in_for_multihead_attention(runner: Runner, bias: bool) -> None:
    graph = graphs()["mesh"]
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 2, bias=bias, batch_first=True).to(runner.device)
    layer = TopologyAttention(32, 2, topology_of(graph), bias=bias, backend=runner.backend).to(runner.device)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.3)
    layer.load_state_dict(plain.state_dict(), strict=True)
    x, position = torch.randn(2, 1 if runner.interpreted else 2, len(graph.mask), 32, device=runner.device)
    for query, key, value in ((x, x, x), (x + position, x + position, x), (x, position, x)):
        want, want_weights = plain(query, key, value, attn_mask=~graph.mask.to(runner.device))
        out, weights = layer(query, key, value, need_weights=True)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.to_dense().mean(1), want_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), layer(x, x, x, need_weights=True)[0])
    shared = x + position
    torch.testing.assert_close(layer(shared, shared, x), layer(shared, shared.clone(), x), rtol=1e-4, atol=1e-5)


def test_layer_drops_in_training_only() -> None:
    layer = TopologyAttention(16, 2, topology_of(graphs()["mesh"]), dropout=0.5)
    x = torch.randn(1, 38, 16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x, seed=3), layer(x, seed=3))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_layer_starts_as_multihead_attention_does() -> None:
    torch.manual_seed(1)
    layer = TopologyAttention(64, 4, topology_of(graphs()["mesh"]))
    torch.manual_seed(1)
    plain = nn.MultiheadAttention(64, 4)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        own = layer.get_parameter(name)
        assert own.shape == parameter.shape
        spread, expected = own.detach().std(), parameter.detach().std()
        assert abs(spread - expected) <= 0.1 * expected, name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((30, 4), ValueError, r"embed_dim \(30\) must be a positive multiple of num_heads \(4\)"),
        ((32, 0), ValueError, "num_heads"),
        ((32, 4, None), TypeError, "topology must be a TokenTopology"),
        ((32, 4, ..., 1.0), ValueError, "dropout must be in"),
    ],
)
def test_layer_refuses_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    topology = topology_of(graphs()["mesh"])
    embed_dim, heads, given, dropout = (*arguments, *(None, None, ..., 0.0)[len(arguments) :])
    with pytest.raises(error, match=message):
        TopologyAttention(embed_dim, heads, topology if given is ... else given, dropout)


def test_layer_refuses_bad_tokens() -> None:
    layer = TopologyAttention(16, 2, topology_of(graphs()["mesh"]))
    with pytest.raises(ValueError, match=r"value must be \[B, L, 16\], got \[1, 38, 8\]"):
        layer(torch.zeros(1, 38, 16), value=torch.zeros(1, 38, 8))
    with pytest.raises(ValueError, match="q has 37 tokens"):
        layer(torch.zeros(1, 37, 16))


def test_upsampling_layer() -> None:
    dense = torch.rand(7, 4) * (torch.rand(7, 4) > 0.4)
    layer = SparseUpsample(scipy_matrix(dense))
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layer(x), torch.einsum("mn,bnc->bmc", dense, x))
    assert not layer.state_dict()


def scipy_matrix(dense: Tensor) -> Any:
    """A dense tensor as a SciPy CSR matrix."""
    import scipy.sparse

    return scipy.sparse.csr_matrix(dense.numpy())
