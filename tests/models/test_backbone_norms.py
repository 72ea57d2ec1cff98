"""Batch norms of the backbones in training: one op with what stands behind them, or PyTorch's operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.backbones import CompactTrunk, HRNetW64, ResNet50, ResNet50Trunk, norm
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro.models.backbones.norm import fuse_batch_norms, norm_relu
from fastmetro_kernels.batch_norm import batch_norm, batch_norm_twice


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return module.double().train()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 for each call of the op, a 2 for one whose result has two takers."""
    found: list[int] = []

    def counted(*given: Any, **options: Any) -> Tensor:
        found.append(1)
        return batch_norm(*given, **options)

    def counted_twice(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found.append(2)
        return batch_norm_twice(*given, **options)

    monkeypatch.setattr(norm, "batch_norm", counted)
    monkeypatch.setattr(norm, "batch_norm_twice", counted_twice)
    return found


def assert_alike(plain: nn.Module, size: int, channels: int, calls: list[int]) -> None:
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
    assert len(calls) == 2 * count
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-6 * float(one.grad.abs().max()), msg=name)
    for (name, one), other in zip(plain.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (24, 2), (32, 1)])
def test_blocks(block: type[BasicBlock] | type[Bottleneck], channels: int, stride: int, calls: list[int]) -> None:
    assert_alike(randomized(block(channels, 8, stride)), 9, channels, calls)


@pytest.mark.parametrize("trunk", [ResNet50, ResNet50Trunk, CompactTrunk])
def test_trunks(trunk: type[nn.Module], calls: list[int]) -> None:
    assert_alike(randomized(trunk()), 64, 3, calls)


def test_the_next_block_and_its_shortcut_take_the_result_twice(calls: list[int]) -> None:
    """So that no kernel adds their gradients: both come to the norm of the block before."""
    blocks = nn.Sequential(Bottleneck(8, 8), Bottleneck(32, 8)).train()
    fuse_batch_norms(blocks)
    taken: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    blocks(torch.randn(2, 8, 5, 5)).sum().backward()
    assert calls.count(2) == 2
    twin = norm.twin_of(taken[0])
    assert twin is not taken[0] and twin.data_ptr() == taken[0].data_ptr()


def test_a_residual_of_another_type_is_left_to_pytorch(calls: list[int]) -> None:
    """As of an image in float32, under autocast: the sum is in float32."""
    plain = BasicBlock(8, 8).train()
    fused = copy.deepcopy(plain)
    fuse_batch_norms(fused)
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(x), fused(x)
    assert got.dtype == expected.dtype == torch.float32 and calls == [1]
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_on_a_gpu(block: type[BasicBlock] | type[Bottleneck], calls: list[int]) -> None:
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
    assert calls.count(2) == 3
    pairs = zip(exact.named_parameters(), fused.parameters(), plain.parameters(), strict=True)
    for (name, true), ours, theirs in pairs:
        assert true.grad is not None and ours.grad is not None and theirs.grad is not None
        errors = [float((one.cpu().double() - true.grad).norm()) for one in (ours.grad, theirs.grad)]
        assert errors[0] <= 3 * errors[1] + 1e-5 * float(true.grad.norm()), (name, errors)
    for one, other in zip(fused.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=1e-4, atol=1e-5)


def test_hrnet_has_fused_blocks(calls: list[int]) -> None:
    """And a fused stem; its exchanges, transitions and the layers behind its stages are as they were."""
    trunk = HRNetW64().train()
    fuse_batch_norms(trunk)
    x = torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(trunk)
    fuse_batch_norms(plain, False)
    fused = trunk(x)
    others = ("fuse_layers", "transition", "downsamp_modules", "final_layer")
    norms = [name for name, layer in trunk.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(calls) == sum(not any(part in name for part in others) for name in norms) > len(norms) / 2
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


def test_compiled() -> None:
    block = randomized(BasicBlock(8, 8)).float()
    fuse_batch_norms(block)
    other = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(compiled(x), block(x))
    for one, same in zip(other.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(one, same)
