"""The max pool of the stems in training: the op where the norm in front of it is fused, else PyTorch's layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.backbones import CompactTrunk, ResNet50, ResNet50Trunk, norm
from fastmetro.models.backbones.norm import fuse_batch_norms, pool, twin_of
from fastmetro_kernels.max_pool import max_pool, max_pool_twice

TRUNKS = [ResNet50, ResNet50Trunk, CompactTrunk]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 for each call of the op, a 2 for one whose result has two takers."""
    found: list[int] = []

    def counted(x: Tensor) -> Tensor:
        found.append(1)
        return max_pool(x)

    def counted_twice(x: Tensor) -> tuple[Tensor, Tensor]:
        found.append(2)
        return max_pool_twice(x)

    monkeypatch.setattr(norm, "max_pool", counted)
    monkeypatch.setattr(norm, "max_pool_twice", counted_twice)
    return found


class _Plain(nn.Module):
    """The same layer where `pool` does not know it."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        self.layer = layer
        self.kernel_size = self.stride = self.padding = self.dilation = self.ceil_mode = self.return_indices = None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def step(trunk: nn.Module, images: Tensor) -> list[Tensor]:
    """The result, and all gradients."""
    out = trunk(images)
    trunk.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in trunk.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_op_is_taken_and_equal(trunk: type[nn.Module], calls: list[int], device: torch.device) -> None:
    torch.manual_seed(0)
    plain = trunk().train()
    for layer in plain.modules():  # so that residual branches and all gradients count
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    fused = plain.to(device, torch.float64 if device.type == "cpu" else torch.float32)
    fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse_batch_norms(fused)
    plain = copy.deepcopy(fused)
    for name, layer in plain.named_children():
        if isinstance(layer, nn.MaxPool2d):
            setattr(plain, name, _Plain(layer))
    images = torch.randn(2, 3, 64, 64).to(next(fused.parameters())).contiguous(memory_format=torch.channels_last)
    # cuDNN may choose algorithms whose sums differ from call to call, which norms over a few positions make more of.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        expected = step(plain, images)
        assert calls == []
        found = step(fused, images)
    assert calls == [2] and len(found) == len(expected) == 1 + len(list(fused.parameters()))
    rounding = 1e-9 if device.type == "cpu" else 1e-3
    for one, same in zip(found, expected, strict=True):
        torch.testing.assert_close(one, same, rtol=rounding, atol=rounding * float(same.abs().max()))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_otherwise_the_layer_is(trunk: type[nn.Module], calls: list[int]) -> None:
    """Where nothing was fused, and in evaluation. No name changes."""
    module = trunk().train()
    names = list(module.state_dict())
    module(torch.randn(2, 3, 32, 32))
    fuse_batch_norms(module)
    with torch.no_grad():
        module.eval()(torch.randn(1, 3, 32, 32))
    assert calls == [] and list(module.state_dict()) == names
    module.train()(torch.randn(2, 3, 32, 32))
    assert calls == [2]


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, dilation=2)],
    ids=str,
)
def test_other_pools_stay_pytorchs(layer: nn.MaxPool2d, calls: list[int]) -> None:
    before = nn.BatchNorm2d(4)
    fuse_batch_norms(before)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(pool(before, layer, x), layer(x)) and calls == []


def test_two_take_the_result() -> None:
    before, layer = nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1)
    x = torch.randn(2, 4, 9, 9)
    assert twin_of(y := pool(before, layer, x)) is y
    fuse_batch_norms(before)
    y = pool(before, layer, x)
    assert twin_of(y) is not y and twin_of(y).data_ptr() == y.data_ptr() and torch.equal(y, layer(x))


def test_compiled(calls: list[int]) -> None:
    """Without a break of the graph, and with the op for one taker."""
    before, layer = nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1)
    fuse_batch_norms(before)

    def stem(x: Tensor) -> Tensor:
        y = pool(before, layer, norm.norm_relu(before, x))
        return y + twin_of(y).square()

    torch._dynamo.reset()
    compiled: Any = torch.compile(stem, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 7, 5, requires_grad=True)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert calls == [1]
    (expected,) = torch.autograd.grad(stem(x).sum(), x)
    torch.testing.assert_close(found, expected)
