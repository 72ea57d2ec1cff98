"""Backbones by name: each compiles as one graph, at one size and for any, and bad sizes get an error that says so."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.backbones import BACKBONES, HRNetW64
from fastmetro.models.baselines.tuned import fold_batch_norm


@functools.cache
def trunk(name: str) -> nn.Module:
    """Never changed."""
    torch.manual_seed(0)
    return BACKBONES[name]().eval().requires_grad_(False)


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_compiles_as_one_graph(name: str, folded: bool) -> None:
    torch._dynamo.reset()
    backbone = trunk(name)
    if folded:  # as the strongest plain PyTorch runs it
        backbone = copy.deepcopy(backbone)
        fold_batch_norm(backbone)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images(64, 96)), backbone(images(64, 96)))


@pytest.mark.parametrize("name", BACKBONES)
def test_one_graph_serves_other_sizes(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(trunk(name), backend="eager", fullgraph=True, dynamic=True)
    for x in (images(64, 96, batch=2), images(96, 128, batch=3)):
        torch.testing.assert_close(compiled(x), trunk(name)(x))


def test_height_and_width_of_hrnet_are_checked() -> None:
    assert isinstance(trunk("hrnet-w64"), HRNetW64)
    for height, width in ((64, 48), (48, 64)):
        with pytest.raises(ValueError, match=f"multiples of 32, got {height} x {width}"):
            trunk("hrnet-w64")(images(height, width))
