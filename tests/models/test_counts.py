"""Parameter counts of Tables 1, 2 and 4 of the paper, to the last parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmetro.models import create_model
from fastmetro.models.backbones import HRNetW64, ResNet50Trunk

RESNET50 = 23_508_032


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "expected"), [("fastmetro-s", 9_297_030), ("fastmetro-m", 17_116_294), ("fastmetro-l", 24_935_558)]
)
def test_transformer_variants(name: str, expected: int, body_sized: Any) -> None:
    assert count(create_model(name, nn.Identity(), body_sized)) == expected


@pytest.mark.parametrize(("name", "layers"), [("fastmetro-s", 1), ("fastmetro-m", 2), ("fastmetro-l", 3)])
def test_hand_variants(name: str, layers: int, hand_sized: Any) -> None:
    """A hand differs from a body by its tokens alone: 21 + 195 of them instead of 14 + 431."""
    body = {"fastmetro-s": 9_297_030, "fastmetro-m": 17_116_294, "fastmetro-l": 24_935_558}[name]
    model = create_model(name, nn.Identity(), hand_sized)
    assert count(model) == body - 512 * (14 + 431 - 21 - 195)
    assert len(model.transformer_1.encoder.layers) == len(model.transformer_2.decoder.layers) == layers


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({"masking": "none"}, "32.8"),  # the paper cuts 32.805 to 32.7
        ({"masking": "half-heads"}, "32.8"),
        ({"upsampling": "learned"}, "45.4"),
        ({"dim_reduction": False}, "39.5"),
    ],
)
def test_ablations_of_table_4(options: dict[str, Any], millions: str, body_sized: Any) -> None:
    total = RESNET50 + count(create_model("fastmetro-s", nn.Identity(), body_sized, **options))
    assert f"{total / 1e6:.1f}" == millions


def test_released_upsampling_adds_one_linear_layer(body_sized: Any) -> None:
    released = create_model("fastmetro-s", nn.Identity(), body_sized, upsampling="released")
    assert count(released) == 9_297_030 + 744_336


def test_resnet50_trunk() -> None:
    assert count(ResNet50Trunk()) == RESNET50


def test_hrnet_w64() -> None:
    with torch.device("meta"):
        assert count(HRNetW64()) == 128_059_944  # with the classifier that the published file brings


def test_compact_fits_16_mib_of_bfloat16(body_sized: Any) -> None:
    model = create_model("fastmetro-compact", mesh=body_sized)
    stored = sum(
        value.numel() * 2 if value.is_floating_point() else value.nbytes for value in model.state_dict().values()
    )
    assert 8_000_000 < count(model) < 8_300_000
    assert stored < 16 * 2**20
