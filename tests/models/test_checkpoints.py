"""Released checkpoints load by name; others are refused with the differences, and nothing is half loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models import FastMETRO, create_model
from fastmetro.models.backbones import CompactTrunk, ResNet50, ResNet50Trunk
from fastmetro.models.checkpoints import CheckpointMismatch, describe, load_checkpoint, read_state_dict


@pytest.fixture
def model(tiny: Any) -> FastMETRO:
    return create_model("fastmetro-compact", mesh=tiny, upsampling="released")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scrambled(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value + 3
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module.", "safetensors"])
def test_forms_of_a_checkpoint(form: str, model: FastMETRO, tmp_path: Path) -> None:
    state = scrambled(model)
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "state_dict.bin")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "module.":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state if form == "plain" else {form: state, "epoch": 3}, path)
    load_checkpoint(model, path)
    assert same(model.state_dict(), state)


def test_plain_load_state_dict_is_strict(model: FastMETRO, tmp_path: Path) -> None:
    state = scrambled(model)
    torch.save(state, tmp_path / "a.bin")
    model.load_state_dict(torch.load(tmp_path / "a.bin", weights_only=True))
    assert same(model.state_dict(), state)
    del state["xyz_regressor.bias"]
    with pytest.raises(RuntimeError, match=r"xyz_regressor\.bias"):
        model.load_state_dict(state)


def test_wrong_architecture_is_refused_whole(tiny: Any, tmp_path: Path) -> None:
    small = create_model("fastmetro-s", CompactTrunk(), tiny)
    large = create_model("fastmetro-l", CompactTrunk(), tiny, upsampling="released")
    torch.save(large.state_dict(), tmp_path / "large.bin")
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(small, tmp_path / "large.bin")
    message = str(caught.value)
    assert same(small.state_dict(), before)
    assert not caught.value.missing
    assert "transformer_1.encoder.layers.1.linear1.weight" in caught.value.unexpected
    assert "coarse2intermediate_upsample.weight" in caught.value.unexpected
    assert "looks like fastmetro-l" in message
    assert "the model is fastmetro-s" in message
    assert "upsampling 'released'" in message
    assert len(caught.value.unexpected) == 122  # 2 stages x 2 layers x (12 + 18) and the upsampling
    assert "and 112 more" in message


def test_other_mesh_is_refused_with_shapes(tiny: Any, body_sized: Any, tmp_path: Path) -> None:
    torch.save(create_model("fastmetro-compact", mesh=body_sized).state_dict(), tmp_path / "a.bin")
    with pytest.raises(CheckpointMismatch, match="14 joints, 431 coarse vertices") as caught:
        load_checkpoint(create_model("fastmetro-compact", mesh=tiny), tmp_path / "a.bin")
    assert caught.value.shapes["vertex_token_embed.weight"] == ((12, 256), (431, 256))
    assert "model [12, 256], file [431, 256]" in str(caught.value)


def test_torchvision_names_load_into_the_released_layout(tiny: Any, tmp_path: Path) -> None:
    imagenet = scrambled(ResNet50())
    imagenet |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(imagenet, tmp_path / "resnet50.pth")
    trunk = ResNet50Trunk()
    load_checkpoint(trunk, tmp_path / "resnet50.pth")
    assert torch.equal(trunk[0].weight, imagenet["conv1.weight"])
    assert torch.equal(trunk[7][2].bn3.running_var, imagenet["layer4.2.bn3.running_var"])
    assert "backbone.7.2.bn3.running_var" in create_model("fastmetro-s", trunk, tiny).state_dict()
    ResNet50().load_state_dict(imagenet)

    model = create_model("fastmetro-s", trunk, tiny)
    trunk[4][0].conv1.weight.data.zero_()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    model.load_state_dict(state | {f"backbone.{name}": value for name, value in imagenet.items()})
    assert torch.equal(model.backbone[4][0].conv1.weight, imagenet["layer1.0.conv1.weight"])


def test_counters_of_batch_norm_may_be_missing(model: FastMETRO, tmp_path: Path) -> None:
    state = {name: value for name, value in scrambled(model).items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.bin")
    load_checkpoint(model, tmp_path / "old.bin")
    assert torch.equal(model.xyz_regressor.weight, state["xyz_regressor.weight"])


def test_describe_names_backbones() -> None:
    assert "'resnet50'" in describe(ResNet50().state_dict())
    assert "'resnet50'" in describe(ResNet50Trunk().state_dict())
    assert "'compact'" in describe(CompactTrunk().state_dict())
    assert describe({"a": torch.zeros(1)}) == "no FastMETRO network"


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_state_dict(tmp_path / "absent.bin")
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, world")
    for name in ("text.bin", "text.safetensors"):
        with pytest.raises(ValueError, match=name):
            read_state_dict(tmp_path / name)
    torch.save({"a": torch.zeros(2)}, tmp_path / "damaged.bin")
    damaged = (tmp_path / "damaged.bin").read_bytes().replace(b"PK\x01\x02", b"PKxx")
    (tmp_path / "damaged.bin").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged\.bin is a damaged archive"):
        read_state_dict(tmp_path / "damaged.bin")
    torch.save({"a": torch.zeros(2), "b": 3}, tmp_path / "mixed.bin")
    with pytest.raises(ValueError, match=r"tensors only, got \['b'\]"):
        read_state_dict(tmp_path / "mixed.bin")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "big.bin")
    with pytest.raises(ValueError, match="max_bytes=1,000"):
        read_state_dict(tmp_path / "big.bin", max_bytes=1000)


class _Payload:
    """What a hostile pickle would do: call something while it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    torch.save({"a": _Payload(target)}, tmp_path / "evil.bin")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Payload(target)))
    for name in ("evil.bin", "evil.pkl"):
        with pytest.raises(ValueError, match="Whole pickled modules"):
            read_state_dict(tmp_path / name)
    assert not target.exists()
