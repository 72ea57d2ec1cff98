"""Layers against `nn.MultiheadAttention`, the mask, shared tokens and dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_here import available
from test_network import images, small
from torch import Tensor, nn

from fastmetro.models.attention import TokenAttention
from fastmetro.models.position_encoding import sine_position_encoding
from fastmetro.models.transformer import DecoderLayer, EncoderLayer, Transformer

WIDTH, HEADS, FEEDFORWARD = 32, 2, 48
BACKENDS = ["dense", "reference", "native", "triton"]


def multihead(source: nn.Module) -> nn.MultiheadAttention:
    """PyTorch's module with the same weights; its names are ours."""
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    module.load_state_dict(source.state_dict())
    return module.eval()


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(F.relu(layer.linear1(x)))


def blocked_pairs(topology: Any) -> Tensor:
    """The mask written down from its definition, in `nn.MultiheadAttention`'s sense (True = blocked)."""
    hubs, offsets, columns = topology.num_hubs, topology.row_offsets.tolist(), topology.columns.tolist()
    blocked = torch.ones(topology.num_tokens, topology.num_tokens, dtype=torch.bool)
    blocked[:hubs] = blocked[:, :hubs] = False
    for row in range(topology.num_vertices):
        for column in columns[offsets[row] : offsets[row + 1]]:
            blocked[hubs + row, hubs + column] = False
    return blocked


def need(attention: str, device: torch.device) -> None:
    if attention not in available(device):
        pytest.skip(f"attention={attention!r} cannot run on {device} here")


def test_initial_values_follow_multihead_attention() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS)
    torch.manual_seed(0)
    ours = EncoderLayer(WIDTH, HEADS, FEEDFORWARD, 0.1).self_attn
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert not ours.in_proj_bias.any()
    assert not ours.out_proj.bias.any()
    assert ours.in_proj_weight.abs().max() <= (6 / (4 * WIDTH)) ** 0.5  # Xavier-uniform of a [3C, C] matrix


def test_encoder_layer_is_multihead_attention() -> None:
    torch.manual_seed(1)
    layer = EncoderLayer(WIDTH, HEADS, FEEDFORWARD, 0.1).eval()
    tokens, position = torch.randn(2, 9, WIDTH), torch.randn(9, WIDTH)
    x = layer.norm1(tokens)
    expected = tokens + multihead(layer.self_attn)(x + position, x + position, x, need_weights=True)[0]
    expected = expected + feed_forward(layer, layer.norm2(expected))
    torch.testing.assert_close(layer(tokens, position), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("masking", ["all", "none", "half-heads"])
def test_decoder_layer_is_masked_multihead_attention(
    masking: str, attention: str, tiny: Any, device: torch.device
) -> None:
    need(attention, device)
    torch.manual_seed(2)
    layer = DecoderLayer(WIDTH, HEADS, FEEDFORWARD, 0.1).eval()
    tokens = torch.randn(2, tiny.topology.num_tokens, WIDTH)
    memory, position = torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH)
    blocked = blocked_pairs(tiny.topology)
    free = torch.zeros_like(blocked)
    per_head = {"all": [blocked] * 2, "none": [free] * 2, "half-heads": [blocked, free]}[masking]
    mask = torch.stack(per_head * 2)  # [B * H, L, L]
    x = layer.norm1(tokens)
    expected = tokens + multihead(layer.self_attn)(x, x, x, attn_mask=mask)[0]
    x = layer.norm2(expected)
    expected = expected + multihead(layer.multihead_attn)(x, memory + position, memory)[0]
    expected = expected + feed_forward(layer, layer.norm3(expected))

    attend = TokenAttention(copy.deepcopy(tiny.topology), HEADS, masking, attention).to(device)
    arguments = [x.to(device) for x in (tokens, memory, position)]
    torch.testing.assert_close(layer.to(device)(*arguments, attend).cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_shared_tokens_are_the_same_as_repeated_ones(
    training: bool, attention: str, tiny: Any, device: torch.device
) -> None:
    need(attention, device)
    torch.manual_seed(3)
    stage = Transformer(WIDTH, HEADS, FEEDFORWARD, dropout=0.0, layers=2).train(training).to(device)
    attend = TokenAttention(copy.deepcopy(tiny.topology), HEADS, backend=attention).to(device)
    image, camera = torch.randn(3, 6, WIDTH, device=device), torch.randn(3, 1, WIDTH, device=device)
    position = torch.randn(6, WIDTH, device=device)
    tokens = torch.randn(1, tiny.topology.num_tokens, WIDTH, device=device, requires_grad=True)
    results = []
    for given in (tokens, tokens.expand(3, -1, -1).contiguous()):
        out = stage(image, camera, given, position, attend)[2]
        (gradient,) = torch.autograd.grad(out.square().sum(), tokens)
        results.append((out, gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def batches(stage: Transformer, attend: TokenAttention, patch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many samples the self-attentions of the decoder's layers are given, by what is done with them."""
    seen: dict[str, list[int]] = {"project": [], "attend": []}
    layers: list[Any] = list(stage.decoder.layers)
    for layer in layers:
        project = layer.self_attn.query_key_value

        def projected(x: Tensor, project: Any = project) -> list[Tensor]:
            seen["project"].append(len(x))
            return project(x)

        patch.setattr(layer.self_attn, "query_key_value", projected)
    attend.register_forward_pre_hook(lambda _, given: seen["attend"].append(len(given[0])))
    return seen


@pytest.mark.parametrize(("dropout", "training", "attended"), [(0.1, True, 3), (0.0, True, 1), (0.1, False, 1)])
def test_shared_tokens_are_projected_once(
    dropout: float, training: bool, attended: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each sample: the norm, queries, keys and values of the first layer, and without dropout its attention,
    the next norm and the queries of the cross-attention."""
    stage = Transformer(WIDTH, HEADS, FEEDFORWARD, dropout, layers=2).train(training)
    attend = TokenAttention(copy.deepcopy(tiny.topology), HEADS, backend="dense")
    seen, normed = batches(stage, attend, monkeypatch), []
    first: Any = stage.decoder.layers[0]
    for norm in (first.norm1, first.norm2, first.norm3):
        norm.register_forward_pre_hook(lambda _, given: normed.append(len(given[0])))
    tokens = torch.randn(1, tiny.topology.num_tokens, WIDTH)
    stage(torch.randn(3, 6, WIDTH), torch.randn(3, 1, WIDTH), tokens, torch.randn(6, WIDTH), attend)
    assert seen == {"project": [1, 3], "attend": [attended, 3]} and normed == [1, attended, 3]


def test_the_network_shares_its_tokens(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples start from the same joint and vertex tokens, in the first stage alone."""
    network = small(tiny, attention="dense", dropout=0.1).train()
    first = batches(network.transformer_1, network.token_attention, monkeypatch)
    second = batches(network.transformer_2, network.token_attention, monkeypatch)
    network(images(3, 64))
    assert first["project"] == [1] and second["project"] == [3]


@pytest.mark.parametrize("attention", BACKENDS)
def test_dropout_differs_between_samples_and_repeats_with_the_seed(
    attention: str, tiny: Any, device: torch.device
) -> None:
    need(attention, device)
    layer = DecoderLayer(WIDTH, HEADS, FEEDFORWARD, dropout=0.0).to(device).train()
    layer.dropout = 0.5
    layer._drop = lambda x: x  # type: ignore[method-assign]  # leaves only the dropout on attention weights
    attend = TokenAttention(copy.deepcopy(tiny.topology), HEADS, backend=attention).to(device)
    tokens = torch.randn(1, tiny.topology.num_tokens, WIDTH, device=device)
    memory = torch.zeros(2, 6, WIDTH, device=device)
    with torch.no_grad():  # without values of the image, only the self-attention can tell samples apart
        layer.multihead_attn.in_proj_weight.zero_()
    out = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out.append(layer(tokens, memory, memory[0], attend))
    assert not torch.allclose(out[0][0], out[0][1])
    torch.testing.assert_close(out[0], out[1])
    assert not torch.allclose(out[0], out[2])


def test_position_encoding() -> None:
    position = sine_position_encoding(3, 4, 8)
    assert position.shape == (12, 8)
    row, column = 2, 1  # counted from 1 and scaled to 2 pi
    y, x = torch.tensor([(row + 1) / 3, (column + 1) / 4]) * 2 * torch.pi
    expected = [y.sin(), y.cos(), (y / 100).sin(), (y / 100).cos(), x.sin(), x.cos(), (x / 100).sin(), (x / 100).cos()]
    torch.testing.assert_close(position[row * 4 + column], torch.stack(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_position_encoding(3, 4, 6)
