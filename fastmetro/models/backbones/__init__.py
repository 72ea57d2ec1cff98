"""Convolutional backbones: ResNet-50, HRNet-W64 and the compact trunk, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastmetro.models.backbones.compact import CompactTrunk
from fastmetro.models.backbones.hrnet import HRNetW64
from fastmetro.models.backbones.resnet import ResNet50, ResNet50Trunk

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "resnet50": ResNet50Trunk,
    "hrnet-w64": HRNetW64,
    "compact": CompactTrunk,
}

__all__ = ["BACKBONES", "CompactTrunk", "HRNetW64", "ResNet50", "ResNet50Trunk", "create_backbone"]


def create_backbone(name: str) -> nn.Module:
    """Build a backbone by name, randomly initialised.

    Raises:
        ValueError: the name is not one of ``BACKBONES``.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(map(repr, BACKBONES))} or an nn.Module, got {name!r}")
    return BACKBONES[name]()
