"""Convolutions of a backbone by this project's kernel in training: which are taken, and what they tell the norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.backbones import HRNetW64, ResNet50Trunk, norm, overlap
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro.models.backbones.half_weights import keep_half_weights, kept_weights
from fastmetro.models.backbones.norm import fuse_batch_norms
from fastmetro.models.backbones.overlap import (
    convolve,
    overlap_weight_gradients,
    take_own_convolutions,
    told_moments,
)
from fastmetro.training.optimizer import ClippedAdamW

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
LAST = torch.channels_last


def test_which_can_be_taken() -> None:
    """All but the first, of images of three channels, and those with a bias."""
    trunk = ResNet50Trunk()
    assert take_own_convolutions(trunk) == 52
    taken = [layer for layer in trunk.modules() if isinstance(layer, nn.Conv2d) and getattr(layer, overlap._OWN, False)]
    assert len(taken) == 52 and all(layer.in_channels > 3 for layer in taken)
    take_own_convolutions(trunk, False)
    assert not any(getattr(layer, overlap._OWN, False) for layer in trunk.modules())
    with torch.device("meta"):
        network = HRNetW64()
    wide = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels > 3]
    assert take_own_convolutions(network) == sum(layer.bias is None for layer in wide) > 200
    for options in ({"groups": 2}, {"dilation": 2}, {"bias": True}, {"padding": "same"}, {"padding": (0, 1)}):
        assert take_own_convolutions(nn.Conv2d(32, 32, 3, **{"bias": False, **options})) == 0  # type: ignore[arg-type]


def test_elsewhere_nothing_is_told() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    overlap_weight_gradients(layer)
    assert take_own_convolutions(layer) == 1
    x = torch.randn(2, 16, 5, 5)
    out = convolve(layer, x)
    assert told_moments(out) is None
    torch.testing.assert_close(out, nn.functional.conv2d(x, layer.weight, padding=1))


def blocks(block: type[BasicBlock] | type[Bottleneck]) -> nn.Sequential:
    wide = 32 * block.expansion
    torch.manual_seed(0)
    return nn.Sequential(block(32, 32), block(wide, 32), block(wide, 48, 2)).train()


def counting(call: Callable[..., Any], told: list[bool]) -> Callable[..., Any]:
    """The same, and whether moments were given to it."""

    def counted(*given: Any, **named: Any) -> Any:
        told.append(named["moments"] is not None)
        return call(*given, **named)

    return counted


@needs_hopper
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_on_a_gpu(
    block: type[BasicBlock] | type[Bottleneck], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, gradients and buffers as those of cuDNN's convolutions, each against float64."""
    told: list[bool] = []
    for name in ("batch_norm", "batch_norm_twice"):
        monkeypatch.setattr(norm, name, counting(getattr(norm, name), told))
    exact = blocks(block).double()
    fused = copy.deepcopy(exact).float().cuda().to(memory_format=LAST)  # type: ignore[call-overload]
    plain = copy.deepcopy(fused)
    for module in (fused, plain):
        fuse_batch_norms(module)
        overlap_weight_gradients(module)
    count = take_own_convolutions(fused)
    optimizer = None
    if half:
        keep_half_weights(fused)
        optimizer = ClippedAdamW(fused.parameters(), lr=1e-3)
    x = torch.randn(4, 32, 15, 13)
    outs: list[Tensor] = []
    for module in (exact, fused, plain):
        given = x.to(next(module.parameters())).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=module is not exact):
            outs.append(module(given))
        outs[-1].double().square().mean().backward()
    torch.cuda.synchronize()
    assert sum(told) == count == len(told) // 2
    errors = [float((one.detach().cpu().double() - outs[0]).norm()) for one in outs[1:]]
    assert errors[0] <= 1.5 * errors[1]
    if half:
        for parameter, kept in kept_weights(fused.parameters()):
            kept.settle(parameter)
    for (name, true), ours, theirs in zip(
        exact.named_parameters(), fused.parameters(), plain.parameters(), strict=True
    ):
        assert true.grad is not None and ours.grad is not None and theirs.grad is not None
        wrong = [float((one.cpu().double() - true.grad).norm()) for one in (ours.grad, theirs.grad)]
        assert wrong[0] <= 1.5 * wrong[1] + 1e-2 * float(true.grad.norm()), (name, wrong)
    for one, other in zip(fused.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=2e-2, atol=2e-2)
    del optimizer


@needs_hopper
def test_weights_that_were_written_just_now() -> None:
    """The kernel reads weights early: not where the optimizer's may still be under way."""
    layer = nn.Conv2d(64, 256, 1, bias=False).cuda().to(memory_format=LAST)  # type: ignore[call-overload]
    overlap_weight_gradients(layer)
    take_own_convolutions(layer)
    keep_half_weights(layer)
    optimizer = ClippedAdamW(layer.parameters(), lr=1.0)
    x = torch.randn(8, 64, 28, 28, device="cuda").to(memory_format=LAST)
    made = (2 * x).requires_grad_() * 1  # something was computed for it
    for given in (x, made) * 4:
        with torch.autocast("cuda", torch.bfloat16):
            convolve(layer, given).float().square().mean().backward(retain_graph=True)
            optimizer.step_clipped(1.0)
            got = convolve(layer, given)
        expected = nn.functional.conv2d(given.bfloat16(), layer.weight.bfloat16())
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-2)
        optimizer.zero_grad()
