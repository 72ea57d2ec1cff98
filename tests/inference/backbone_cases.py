"""What the tests of the folded backbones share: trunks as after training, images, and measures of error."""

from __future__ import annotations

import copy
import functools
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastmetro.models.backbones import CompactTrunk, HRNetW64, ResNet50, ResNet50Trunk

TRUNKS: list[type[nn.Module]] = [ResNet50, ResNet50Trunk, CompactTrunk, HRNetW64]
Module = TypeVar("Module", bound=nn.Module)


def randomize(module: Module, seed: int = 0) -> Module:
    """Batch norms and biases as after training: nothing is zero, one, or the same in two channels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(x: Tensor, low: float, high: float) -> None:
        x.copy_(low + (high - low) * torch.rand(x.shape, generator=generator))

    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                assert child.running_mean is not None and child.running_var is not None
                uniform(child.running_mean, -0.3, 0.3)
                uniform(child.running_var, 0.3, 2.0)
                uniform(child.weight, 0.2, 1.0)
                uniform(child.bias, -0.2, 0.2)
            elif isinstance(child, nn.Conv2d) and child.bias is not None:
                uniform(child.bias, -0.3, 0.3)
    return module.eval()


@functools.cache
def all_trunks() -> dict[type[nn.Module], nn.Module]:
    """One float32 trunk of every type; never changed."""
    torch.manual_seed(0)
    return {kind: randomize(kind()) for kind in TRUNKS}


def images(batch: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def error(result: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert result.shape == exact.shape
    return float((result.cpu().double() - exact).abs().max() / exact.abs().max())


def rounding(result: Tensor, exact: Tensor) -> float:
    """Root mean square difference: unlike the largest one it hardly depends on chance."""
    assert result.shape == exact.shape
    return float((result.cpu().double() - exact).square().mean().sqrt())


@torch.no_grad()
def exact(backbone: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(backbone).double()(x.double())
