"""The networks against outputs of the published ones, float32, 1e-4 relative."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from fastmetro.models import create_model
from fastmetro.models.backbones import HRNetW64, ResNet50, ResNet50Trunk

TOLERANCE = 1e-4


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(actual.shape) == expected.shape
    return float(np.abs(actual.detach().cpu().numpy() - expected).max() / np.abs(expected).max())


def names_and_shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("attention", ["dense", "reference", "native", "triton"])
@pytest.mark.parametrize("part", ["body", "hand"])
def test_network(
    part: str, attention: str, device: torch.device, shared: Path, recipe: ModuleType, request: pytest.FixtureRequest
) -> None:
    model = make(part, attention, device, request)
    listed = json.loads((shared / f"golden/fastmetro_s_{part}_state_dict.json").read_text())
    assert names_and_shapes(model) == listed
    recipe.fill_(model.state_dict())
    rng = np.random.Generator(np.random.PCG64(11))
    samples = 1 if attention == "triton" and device.type == "cpu" else 2  # the interpreter is slow
    features = torch.from_numpy(rng.standard_normal((2, 2048, 7, 7)))[:samples].float().relu().to(device)
    with torch.inference_mode():
        out = model.eval()(features)
    with np.load(shared / f"golden/fastmetro_s_{part}.npz") as golden:
        assert set(out) == set(golden)
        for key in golden:
            assert relative_error(out[key], golden[key][:samples]) < TOLERANCE, key


def make(part: str, attention: str, device: torch.device, request: pytest.FixtureRequest) -> nn.Module:
    from backends_here import available

    if attention not in available(device):
        pytest.skip(f"attention={attention!r} cannot run on {device} here")
    if attention == "triton" and device.type == "cpu" and part == "body":
        pytest.skip("a minute in Triton's interpreter; the hand covers it")
    mesh = request.getfixturevalue(part)
    return create_model(
        "fastmetro-s", backbone=nn.Identity(), mesh=mesh, upsampling="released", attention=attention
    ).to(device)


@pytest.mark.parametrize(("name", "backbone"), [("resnet50", ResNet50), ("hrnet_w64", HRNetW64)])
def test_backbone(name: str, backbone: type[nn.Module], device: torch.device, shared: Path, recipe: ModuleType) -> None:
    with torch.device("meta"):  # every value comes from the recipe: no time for random ones
        trunk = backbone()
    trunk = trunk.to_empty(device=device).eval()
    assert names_and_shapes(trunk) == json.loads((shared / f"golden/{name}_state_dict.json").read_text())
    recipe.fill_(trunk.state_dict())
    images = recipe.image(1, seed=3).to(device)
    with torch.inference_mode(), np.load(shared / f"golden/{name}.npz") as golden:
        assert relative_error(trunk(images), golden["features"]) < TOLERANCE
    if name == "resnet50":  # the released layout takes the same file and computes the same
        with torch.device("meta"):
            released = ResNet50Trunk().eval()
        released.load_state_dict(trunk.state_dict(), assign=True)
        with torch.inference_mode():
            assert torch.equal(released(images), trunk(images))
