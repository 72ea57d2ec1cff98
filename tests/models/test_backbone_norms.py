"""Batch norms of the backbones in training: one op with what stands behind them, or PyTorch's operations."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.backbones import CompactTrunk, HRNetW64, ResNet50, ResNet50Trunk, norm
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro.models.backbones.norm import fuse_batch_norms, norm_relu
from fastmetro_kernels.batch_norm import batch_norm, batch_norm_twice


class Call(NamedTuple):
    """Of the op: how many take its result, and how many norms it has."""

    takers: int
    norms: int


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return module.double().train()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """All calls of the op."""
    found: list[Call] = []

    def counted(*given: Any, **options: Any) -> Tensor:
        found.append(Call(1, 1 + ("residual_norm" in options)))
        return batch_norm(*given, **options)

    def counted_twice(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found.append(Call(2, 1 + ("residual_norm" in options)))
        return batch_norm_twice(*given, **options)

    monkeypatch.setattr(norm, "batch_norm", counted)
    monkeypatch.setattr(norm, "batch_norm_twice", counted_twice)
    return found


def assert_alike(plain: nn.Module, size: int, channels: int, calls: list[Call]) -> None:
    """Outputs, gradients and buffers after two steps, in float64, with every norm by the op."""
    fused = copy.deepcopy(plain)
    count = fuse_batch_norms(fused)
    assert count == sum(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    for step in range(2):
        x = torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        outputs = [module(x) for module in (plain, fused)]
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        for output in outputs:
            output.square().sum().backward()
    assert sum(call.norms for call in calls) == 2 * count
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-6 * float(one.grad.abs().max()), msg=name)
    for (name, one), other in zip(plain.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (24, 2), (32, 1)])
def test_blocks(block: type[BasicBlock] | type[Bottleneck], channels: int, stride: int, calls: list[Call]) -> None:
    assert_alike(randomized(block(channels, 8, stride)), 9, channels, calls)


@pytest.mark.parametrize("trunk", [ResNet50, ResNet50Trunk, CompactTrunk])
def test_trunks(trunk: type[nn.Module], calls: list[Call]) -> None:
    assert_alike(randomized(trunk()), 64, 3, calls)


def test_the_next_block_and_its_shortcut_take_the_result_twice(calls: list[Call]) -> None:
    """So that no kernel adds their gradients: both come to the norm of the block before."""
    blocks = nn.Sequential(Bottleneck(8, 8), Bottleneck(32, 8)).train()
    fuse_batch_norms(blocks)
    taken: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    blocks(torch.randn(2, 8, 5, 5)).sum().backward()
    assert [call.takers for call in calls].count(2) == 2
    twin = norm.twin_of(taken[0])
    assert twin is not taken[0] and twin.data_ptr() == taken[0].data_ptr()


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_shortcuts_norm_is_taken_with_the_last_one(
    block: type[BasicBlock] | type[Bottleneck], calls: list[Call]
) -> None:
    """Also where the gradients of some are not asked for: the same for the others."""
    plain = randomized(block(24, 8, 2))
    fused = copy.deepcopy(plain)
    fuse_batch_norms(fused)
    for frozen in ("", "downsample.0", "downsample.1", "conv", "bn", "conv2.weight downsample", "downsample bn conv"):
        calls.clear()
        x = torch.randn(2, 24, 9, 9, dtype=torch.float64)
        images = [x.clone().requires_grad_() for _ in range(2)]
        for module, image in zip((plain, fused), images, strict=True):
            module.zero_grad()
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(not any(part in name for part in frozen.split()))
            module(image).square().sum().backward()
        assert calls[-1] == Call(2, 2) and len(calls) == (1 if block is BasicBlock else 2) + 1
        pairs = [("x", *images), *((name, one, fused.get_parameter(name)) for name, one in plain.named_parameters())]
        for name, one, other in pairs:
            assert (one.grad is None) == (other.grad is None) == (not one.requires_grad), name
            if one.grad is not None and other.grad is not None:
                atol = 1e-6 * float(one.grad.abs().max())
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=atol, msg=name)


@pytest.mark.parametrize("apart", ["not fused", "the last not fused", "evaluated", "no averages"])
def test_norms_of_which_one_is_not_taken_stay_apart(apart: str, calls: list[Call]) -> None:
    plain = randomized(BasicBlock(24, 8, 2))
    assert isinstance(plain, BasicBlock) and plain.downsample is not None
    other = plain.downsample[1]
    if apart == "evaluated":
        other.eval()
    if apart == "no averages":
        other.momentum = None
    fused = copy.deepcopy(plain)
    fuse_batch_norms(fused)
    if "not fused" in apart:
        fuse_batch_norms(fused.bn2 if "last" in apart else fused.downsample[1], False)
    x = torch.randn(2, 24, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
    assert calls == [Call(1, 1), Call(1, 1) if "last" in apart else Call(2, 1)]
    for (name, one), same in zip(plain.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(same, one, rtol=1e-9, atol=1e-9, msg=name)


def test_a_residual_of_another_type_is_left_to_pytorch(calls: list[Call]) -> None:
    """As of an image in float32, under autocast: the sum is in float32."""
    plain = BasicBlock(8, 8).train()
    fused = copy.deepcopy(plain)
    fuse_batch_norms(fused)
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(x), fused(x)
    assert got.dtype == expected.dtype == torch.float32 and calls == [Call(1, 1)]
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_on_a_gpu(block: type[BasicBlock] | type[Bottleneck], calls: list[Call]) -> None:
    """By the kernels, in float32: outputs, gradients and buffers of blocks in a row, as float64 has them."""
    wide = 16 * block.expansion
    exact = randomized(nn.Sequential(block(16, 16), block(wide, 16), block(wide, 16, 2)))
    fused = copy.deepcopy(exact).float().cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = copy.deepcopy(fused)
    fuse_batch_norms(fused)
    x = torch.randn(4, 16, 14, 14)
    for module in (exact, fused, plain):
        given = x.to(next(module.parameters()))
        module(given).square().mean().backward()
    assert [call.takers for call in calls].count(2) == 3
    pairs = zip(exact.named_parameters(), fused.parameters(), plain.parameters(), strict=True)
    for (name, true), ours, theirs in pairs:
        assert true.grad is not None and ours.grad is not None and theirs.grad is not None
        errors = [float((one.cpu().double() - true.grad).norm()) for one in (ours.grad, theirs.grad)]
        assert errors[0] <= 3 * errors[1] + 1e-5 * float(true.grad.norm()), (name, errors)
    for one, other in zip(fused.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=1e-4, atol=1e-5)


def test_hrnet_has_fused_blocks(calls: list[Call]) -> None:
    """And a fused stem; its exchanges, transitions and the layers behind its stages are as they were."""
    trunk = HRNetW64().train()
    fuse_batch_norms(trunk)
    x = torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(trunk)
    fuse_batch_norms(plain, False)
    fused = trunk(x)
    others = ("fuse_layers", "transition", "downsamp_modules", "final_layer")
    norms = [name for name, layer in trunk.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    expected = sum(not any(part in name for part in others) for name in norms)
    assert sum(call.norms for call in calls) == expected > len(norms) / 2
    torch.testing.assert_close(fused, plain(x), rtol=1e-3, atol=1e-3)


def test_only_training_is_changed() -> None:
    block = randomized(Bottleneck(32, 8))
    plain = copy.deepcopy(block).eval()
    fuse_batch_norms(block)
    block.eval()
    x = torch.randn(1, 32, 1, 1, dtype=torch.float64)  # one value per channel, which training does not take
    assert torch.equal(block(x), plain(x))
    assert block.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="at least two values per channel"):
        block.train()(x)


def test_half_precision_under_autocast() -> None:
    block = randomized(Bottleneck(32, 8)).float()
    fused = copy.deepcopy(block)
    fuse_batch_norms(fused)
    x = torch.randn(2, 32, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = block(x.bfloat16()), fused(x.bfloat16())
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(z, y, rtol=0.05, atol=0.05)
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in fused.buffers())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_other_batch_norms_stay_pytorchs(options: dict[str, object]) -> None:
    plain = nn.BatchNorm2d(6, **options).double()  # type: ignore[arg-type]
    fused = copy.deepcopy(plain)
    fuse_batch_norms(fused)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    assert torch.equal(norm_relu(fused, x.clone(), residual=x), (plain(x) + x).relu())


@pytest.mark.parametrize("channels", [8, 24])
def test_compiled(channels: int) -> None:
    block = randomized(BasicBlock(channels, 8)).float()
    fuse_batch_norms(block)
    other = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, channels, 5, 5)
    outs = compiled(x), block(x)
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for one, same in zip(other.parameters(), block.parameters(), strict=True):
        assert one.grad is not None and same.grad is not None
        torch.testing.assert_close(one.grad, same.grad, rtol=1e-4, atol=1e-4 * float(same.grad.abs().max()))
    for one, same in zip(other.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(one, same)
