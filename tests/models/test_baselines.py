"""The networks to compare with compute what ours computes; names load both ways; the published one trains."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmetro.models import FastMETRO, FastMETROConfig, create_backbone, create_model
from fastmetro.models.baselines import published_network, tuned_network
from fastmetro.models.baselines.tuned import fold_batch_norm

SMALL = FastMETROConfig("small", layers=1, widths=(32, 16), feedforward=(48, 32), heads=2, attention="dense")
EXACT = 1e-9  # float64: far above its rounding, far below any mistake


class Trunk(nn.Module):
    """[B, 3, 32 h, 32 w] -> [B, 8, h, w], with a batch norm."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 32, stride=32, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images)).relu()


def randomize_norms(module: nn.Module) -> None:
    """Batch norms as after training: with fresh ones folding would change nothing."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.3, 0.8)
            nn.init.normal_(norm.bias, 0.0, 0.1)
            nn.init.normal_(norm.running_mean, 0.0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)


def small(mesh: Any, **options: Any) -> FastMETRO:
    torch.manual_seed(0)
    model = FastMETRO(replace(SMALL, **options), Trunk(), mesh).double()
    randomize_norms(model)
    return model


def images(batch: int = 2, size: int = 224) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        assert float((actual[key] - value).abs().max()) < EXACT, key


def of_part(mesh: Any, part: str) -> Any:
    return mesh if part == "body" else replace(mesh, upsampling=mesh.upsampling[:1])


@pytest.mark.parametrize(
    "options", [{}, {"layers": 3}, {"upsampling": "released"}, {"upsampling": "learned", "widths": (32, 32)}], ids=str
)
@pytest.mark.parametrize("part", ["body", "hand"])
def test_same_outputs_in_float64(part: str, options: dict[str, Any], tiny: Any) -> None:
    model = small(of_part(tiny, part), **options).eval()
    with torch.no_grad():
        expected = model(images())
        assert_same(published_network(model)(images()), expected)
        for mask in ("bias", "bool"):
            assert_same(tuned_network(model, torch.float64, compile=False, mask=mask)(images()), expected)


@pytest.mark.parametrize("name", ["fastmetro-s", "fastmetro-m", "fastmetro-l", "fastmetro-compact"])
@pytest.mark.parametrize("part", ["body", "hand"])
def test_variants_load_strictly_both_ways(name: str, part: str, body_sized: Any, hand_sized: Any) -> None:
    mesh = body_sized if part == "body" else hand_sized
    model = create_model(name, nn.Identity(), mesh, upsampling="released", attention="dense")
    published = published_network(model)  # loads strictly
    model.load_state_dict(published.state_dict(), strict=True)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in published.state_dict().items()} == shapes
    assert {name for name, _ in published.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_weights_go_both_ways(tiny: Any) -> None:
    model, other = small(tiny).eval(), small(tiny).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
        published = published_network(other)
        model.load_state_dict(published.state_dict(), strict=True)
        assert_same(model(images()), other(images()))
        for parameter in published.parameters():  # a copy: the source does not notice
            parameter.zero_()
        assert_same(model(images()), other(images()))


def test_other_image_sizes(tiny: Any) -> None:
    model = small(tiny).eval()
    with torch.no_grad():
        assert_same(published_network(model)(images(1, 96)), model(images(1, 96)))


def test_without_upsampling(tiny: Any) -> None:
    model = small(replace(tiny, upsampling=())).eval()
    with torch.no_grad():
        assert_same(published_network(model)(images()), model(images()))
        assert_same(tuned_network(model, torch.float64, compile=False)(images()), model(images()))


@pytest.mark.parametrize("part", ["body", "hand"])
def test_golden_outputs(part: str, shared: Path, recipe: ModuleType, request: pytest.FixtureRequest) -> None:
    mesh = request.getfixturevalue(part)
    model = create_model("fastmetro-s", nn.Identity(), mesh, upsampling="released", attention="dense")
    recipe.fill_(model.state_dict())
    features = torch.from_numpy(np.random.Generator(np.random.PCG64(11)).standard_normal((2, 2048, 7, 7)))
    features = features.float().relu()
    networks = [published_network(model.eval()), tuned_network(model, torch.float32, compile=False)]
    with torch.no_grad(), np.load(shared / f"golden/fastmetro_s_{part}.npz") as golden:
        for network in networks:
            out = network(features)
            assert set(out) == set(golden)
            for key in golden:
                error = np.abs(out[key].numpy() - golden[key]).max() / np.abs(golden[key]).max()
                assert error < 1e-4, key


@pytest.mark.parametrize("upsampling", ["fixed", "released"])
def test_published_has_our_gradients(upsampling: str, tiny: Any) -> None:
    model = small(tiny, upsampling=upsampling, dropout=0.0).train()
    gradients = []
    for network in (published_network(model), model):
        out = network(images())
        sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in out.values()).backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        assert gradients[0][name] is not None, name
        assert float((gradients[0][name] - expected).abs().max()) < EXACT * max(1.0, float(expected.abs().max())), name


def test_published_trains_with_dropout(tiny: Any) -> None:
    network = published_network(small(tiny, dropout=0.3).float().train())
    assert network.training
    x = images().float()
    first, second = network(x), network(x)
    assert not torch.equal(first["pred_3d_vertices_fine"], second["pred_3d_vertices_fine"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    target = {key: torch.randn_like(value) for key, value in first.items()}
    losses = []
    for _ in range(10):
        loss = sum(((value - target[key]) ** 2).mean() for key, value in network(x).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_published_moves_its_mask_at_each_call_and_averages_weights(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = published_network(small(tiny, layers=2).eval())
    assert "attention_mask" not in dict(network.named_buffers())
    products, weights = [], []
    monkeypatch.setattr(
        torch.sparse, "mm", lambda matrix, dense: products.append(dense.shape) or matrix.to_dense() @ dense
    )
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
    with torch.no_grad():
        network(images(3))
    assert products.count(torch.Size([12, 3])) == 3  # coarse to fine, sample by sample
    assert len(weights) == 12 and all(value is not None and value.dim() == 3 for value in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tuned_in_half_precision_is_as_good_as_the_plain_model(dtype: torch.dtype, tiny: Any) -> None:
    model = small(tiny, upsampling="released").eval()
    with torch.no_grad():
        exact = model(images())
        plain = copy.deepcopy(model).to(dtype)(images().to(dtype))
        tuned = tuned_network(model, dtype, compile=False)(images())
    for key, value in exact.items():
        scale = float(value.abs().max())
        error = float((tuned[key].double() - value).abs().max())
        # Beside the plain model's error the upsampled meshes round their inputs, weights and results: half an eps each.
        assert error <= 2 * float((plain[key].double() - value).abs().max()) + 2 * torch.finfo(dtype).eps * scale, key


def test_tuned_compiles_once_per_shape_with_constants_frozen(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, bool, bool]] = []
    options: list[dict[str, Any]] = []

    def compile(function: Any, **given: Any) -> Any:
        options.append(given)

        def run(x: Tensor) -> dict[str, Tensor]:
            frozen = torch._inductor.config.freezing
            seen.append((len(x), frozen, torch.backends.cudnn.benchmark, torch.is_grad_enabled()))
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    model = small(tiny).float().eval()
    network = tuned_network(model, torch.float32)
    for batch in (1, 1, 2, 1):
        out = network(images(batch).float())["pred_3d_vertices_fine"]
        torch.testing.assert_close(out, model(images(batch).float())["pred_3d_vertices_fine"], rtol=1e-4, atol=1e-5)
    first = [(1, True, True, False)] * 3
    assert seen == [*first, (1, False, False, False), *[(2, *first[0][1:])] * 3, (1, False, False, False)]
    assert options == [{"mode": "default", "dynamic": False, "fullgraph": True}]
    assert "compiled, frozen" in network.description
    seen.clear()
    tuned_network(model, torch.float32, freezing=False)(images(1))
    assert seen[0] == (1, False, True, False)


def test_tuned_leaves_the_model_alone(tiny: Any) -> None:
    model = small(tiny).train()
    before = copy.deepcopy(model.state_dict())
    tuned_network(model, torch.float16, compile=False)(images())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("name", "norms"), [("compact", 22), ("resnet50", 53), ("hrnet-w64", 325)])
def test_batch_norms_of_the_backbones_fold(name: str, norms: int) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # HRNet's own initialisation takes long
        backbone = create_backbone(name)
    backbone = backbone.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, 0.0, (2.0 / max(1, parameter[0].numel())) ** 0.5)
    for counter in (buffer for buffer in backbone.buffers() if not buffer.is_floating_point()):
        counter.zero_()
    randomize_norms(backbone)
    assert fold_batch_norm(backbone) == norms  # it compares the outputs itself
    assert not [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_convolution_used_twice_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    torch.manual_seed(0)
    backbone = Shared().eval()
    randomize_norms(backbone)
    with pytest.raises(ValueError, match="folding its batch norms changes its output"):
        fold_batch_norm(backbone)


def test_what_is_refused(tiny: Any) -> None:
    for options, message in (
        ({"masking": "none"}, "masking='all' only"),
        ({"smpl_head": True}, "smpl_head=True is not"),
    ):
        with pytest.raises(ValueError, match=message):
            published_network(small(tiny, **options))
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float16.*got torch\.int32"):
        tuned_network(small(tiny), torch.int32)
    with pytest.raises(ValueError, match="mask must be one of 'bias', 'bool', got 'none'"):
        tuned_network(small(tiny), mask="none")
    with pytest.raises(ValueError, match=r"images must be floating point on cpu, got torch\.uint8"):
        tuned_network(small(tiny), compile=False)(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
