"""Gradients of convolutions' weights on a second stream: the same as PyTorch's, at any number of backward passes."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fastmetro.models.backbones import CompactTrunk, ResNet50Trunk, overlap
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro.models.backbones.half_weights import keep_half_weights, kept_weights
from fastmetro.models.backbones.norm import fuse_batch_norms
from fastmetro.models.backbones.overlap import WINDOW, convolve, overlap_weight_gradients
from fastmetro.training.optimizer import ClippedAdamW

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_gradients(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        assert b.grad.dtype == b.dtype and b.grad.stride() == b.stride(), name
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=tolerance * (1 + float(a.grad.abs().max())), msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trunk", [CompactTrunk, ResNet50Trunk])
def test_gradients_of_trunks(trunk: type[nn.Module], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backward passes add up, as they do with gradient accumulation; then anew."""
    calls: list[int] = []
    accumulate = overlap._accumulate

    def counted(parameter: Tensor, found: Tensor) -> None:
        calls.append(1)
        accumulate(parameter, found)

    monkeypatch.setattr(overlap, "_accumulate", counted)
    torch.manual_seed(0)
    plain = trunk().double().to(device).to(memory_format=torch.channels_last).train()
    other = copy.deepcopy(plain)
    count = overlap_weight_gradients(other)
    assert count == sum(isinstance(layer, nn.Conv2d) for layer in plain.modules()) > WINDOW
    for passes in (2, 1):
        for module in (plain, other):
            module.zero_grad(set_to_none=True)
            for seed in range(passes):
                module(images(2, 3, 64, 64, seed=seed).to(device)).square().mean().backward()
        check_gradients(plain, other)
    assert len(calls) == 3 * count


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_inputs_get_their_gradients(block: type[BasicBlock] | type[Bottleneck]) -> None:
    plain = block(24, 8, 2).double().train()
    other = copy.deepcopy(plain)
    overlap_weight_gradients(other)
    gradients = []
    for module in (plain, other):
        x = images(2, 24, 9, 9).requires_grad_()
        module(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    check_gradients(plain, other)


def test_the_types_of_autocast() -> None:
    plain = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    other = copy.deepcopy(plain)
    overlap_weight_gradients(other)
    for x in (images(2, 6, 5, 5).float(), images(2, 6, 5, 5).bfloat16()):
        found = []
        for module in (plain, other):
            module.zero_grad()
            x = x.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = convolve(module, x)
            y.float().square().sum().backward()
            assert y.dtype == torch.bfloat16 and module.weight.grad is not None and x.grad is not None
            assert module.weight.grad.dtype == torch.float32 and x.grad.dtype == x.dtype
            found.append((y.detach(), module.weight.grad, x.grad))
        for one, same in zip(*found, strict=True):
            assert torch.equal(one, same)


def test_where_nothing_is_to_be_done_elsewhere() -> None:
    """Evaluation, no gradients, frozen weights, biases, padding by name: PyTorch's own convolution."""
    x = images(1, 6, 5, 5)
    for change in ("eval", "no_grad", "frozen", "bias", "same"):
        layer = nn.Conv2d(6, 8, 3, bias=change == "bias", padding="same" if change == "same" else 1).double()
        overlap_weight_gradients(layer)
        if change == "eval":
            layer.eval()
        layer.weight.requires_grad_(change != "frozen")
        with torch.set_grad_enabled(change != "no_grad"):
            y = convolve(layer, x.requires_grad_(change != "no_grad"))
        name = type(y.grad_fn).__name__
        assert "_Convolution" not in name and (change == "no_grad") == (y.grad_fn is None), (change, name)


def test_a_failed_backward_pass_spoils_nothing() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)).double()
    other = copy.deepcopy(plain)
    overlap_weight_gradients(other)

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    x = images(2, 8, 5, 5).requires_grad_()
    y = other[0](x)
    y.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        other[1](y).sum().backward()
    other.zero_grad()
    for module in (plain, other):
        module(x).square().sum().backward()
    check_gradients(plain, other)


class _FakeStream:
    """Nothing is beside anything: what is left is which gradients are computed, and when."""

    def __init__(self, *_device: object) -> None:
        self.waits = 0

    def wait_stream(self, _other: object) -> None:
        self.waits += 1

    def wait_event(self, _event: object) -> None: ...

    def record_event(self) -> None: ...


@pytest.fixture
def second_stream(monkeypatch: pytest.MonkeyPatch) -> _FakeStream:
    """The second stream of the CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", _FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", _FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(overlap, "_has_streams", lambda _tensor: True)
    monkeypatch.setattr(overlap, "_streams", {})
    found: _FakeStream = overlap._of(torch.device("cpu"))._stream  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("group", [1, 3, 8, 100])
def test_groups_of_gradients(group: int, second_stream: _FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are there when the pass ends, also those of the last group, and the graph forks once for each."""
    monkeypatch.setattr(overlap, "GROUP", group)
    torch.manual_seed(0)
    plain = CompactTrunk().double().train()
    other = copy.deepcopy(plain)
    count = overlap_weight_gradients(other)
    for module in (plain, other):
        module(images(2, 3, 64, 64)).square().mean().backward()
    check_gradients(plain, other)
    assert second_stream.waits == -(-count // group)


def test_a_pass_inside_another_and_a_failed_one(second_stream: _FakeStream) -> None:
    """Each computes its own gradients; what a failed one left is gone, with its memory."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(BasicBlock(8, 8) for _ in range(3))).double()
    other = copy.deepcopy(plain)
    overlap_weight_gradients(other)

    def run(module: nn.Sequential, fail: bool = False) -> None:
        x = images(2, 8, 5, 5).requires_grad_()
        y = module[0](x)
        if fail:
            y.register_hook(lambda _: 1 / 0)
        y = torch.utils.checkpoint.checkpoint(module[1], y, use_reentrant=True)
        module[2](y).square().sum().backward()

    with pytest.raises(ZeroDivisionError):
        run(other, fail=True)
    gc.collect()
    assert not overlap._of(torch.device("cpu"))._passes
    other.zero_grad()
    other.load_state_dict(plain.state_dict())
    for module in (plain, other):
        run(module)
    check_gradients(plain, other)
    assert second_stream.waits >= 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trunk", [CompactTrunk, ResNet50Trunk])
def test_copies_of_weights_take_the_gradients(trunk: type[nn.Module], device: str) -> None:
    """One pass leaves them as they were computed; two add up in float32, as without copies."""
    torch.manual_seed(0)
    plain = trunk().to(device).to(memory_format=torch.channels_last).train()
    overlap_weight_gradients(plain)
    other = copy.deepcopy(plain)
    count = keep_half_weights(other)
    optimizer = ClippedAdamW(other.parameters())
    deterministic, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        for passes in (1, 2, 1):
            plain.zero_grad()
            optimizer.zero_grad()
            for module in (plain, other):
                for seed in range(passes):
                    x = images(2, 3, 64, 64, seed=seed).float().to(device)
                    with torch.autocast(device, torch.bfloat16):
                        y = module(x)
                    y.float().square().mean().backward()
            kept = kept_weights(other.parameters())
            assert len(kept) == count > WINDOW
            for weight, one in kept:
                assert (one.tensor.grad is None) == (passes == 2) and (weight.grad is None) == (passes == 1)
                one.settle(weight)
            for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
                assert a.grad is not None and b.grad is not None and b.grad.dtype == torch.float32
                assert torch.equal(a.grad, b.grad), (passes, name)
    finally:
        torch.backends.cudnn.deterministic = deterministic


@needs_gpu
@pytest.mark.gpu
def test_training_in_a_graph_with_copies_of_weights() -> None:
    """Bits of training with casts: gradients on the second stream, clipping, updates, replay after replay."""
    torch.backends.cudnn.deterministic = True
    try:
        torch.manual_seed(0)
        plain = ResNet50Trunk().cuda().to(memory_format=torch.channels_last).train()
        overlap_weight_gradients(plain)
        fuse_batch_norms(plain)
        other = copy.deepcopy(plain)
        keep_half_weights(other)
        x = images(8, 3, 224, 224).float().cuda().contiguous(memory_format=torch.channels_last)
        graphs, optimizers, norms = [], [], []
        for module in (plain, other):
            optimizer = ClippedAdamW(module.parameters(), lr=torch.tensor(1e-3, device="cuda"))
            optimizers.append(optimizer)

            def step(module: nn.Module = module, optimizer: ClippedAdamW = optimizer) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = module(x).float().square().mean()
                loss.backward()
                return optimizer.step_clipped(0.3)

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                norms.append(step())
            graphs.append(graph)
        for seed in range(10):
            x.copy_(images(8, 3, 224, 224, seed=seed).float())
            for graph in graphs:
                graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(*norms)
            for (name, one), same in zip(plain.named_parameters(), other.parameters(), strict=True):
                assert torch.equal(one, same), (seed, name)
        for weight, kept in kept_weights(other.parameters()):
            assert torch.equal(kept.tensor, weight.bfloat16())
    finally:
        torch.backends.cudnn.deterministic = False


@needs_gpu
@pytest.mark.gpu
def test_in_a_graph_replay_after_replay() -> None:
    """Bits of one stream; the fused norms beside it."""
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True
    try:
        plain = ResNet50Trunk().cuda().to(memory_format=torch.channels_last).train()
        fuse_batch_norms(plain)
        other = copy.deepcopy(plain)
        overlap_weight_gradients(other)
        x = images(8, 3, 224, 224).float().cuda().contiguous(memory_format=torch.channels_last)
        expected = []
        graphs = []
        for module in (plain, other):

            def step(module: nn.Module = module) -> None:
                module.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = module(x).float().square().mean()
                loss.backward()

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            module.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            graphs.append(graph)
        for seed in range(20):
            x.copy_(images(8, 3, 224, 224, seed=seed).float())
            for graph in graphs:
                graph.replay()
            torch.cuda.synchronize()
            for (name, one), same in zip(plain.named_parameters(), other.parameters(), strict=True):
                assert one.grad is not None and same.grad is not None
                assert torch.equal(one.grad, same.grad), (seed, name)
            expected.append(float(next(plain.parameters()).grad.norm()))  # type: ignore[union-attr]
        assert len(set(expected)) == len(expected)  # each replay computed something else
    finally:
        torch.backends.cudnn.deterministic = False


def test_which_convolution_is_the_stem() -> None:
    """ResNet's, and no other."""
    options = [
        (layer.weight, (layer.stride, layer.padding, layer.dilation, layer.groups))
        for trunk in (ResNet50Trunk(), CompactTrunk())
        for layer in trunk.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    assert [overlap._is_stem(weight, given) for weight, given in options] == [True] + [False] * (len(options) - 1)
    weight = options[0][0]
    for given in (((1, 1), (3, 3), (1, 1), 1), ((2, 2), (0, 0), (1, 1), 1), ((2, 2), (3, 3), (2, 2), 1)):
        assert not overlap._is_stem(weight, given)


@needs_gpu
def test_the_stem_by_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution to bfloat16's rounding, and the gradient of its weight."""
    called: list[str] = []
    for name in ("_stem", "_own_gradient"):
        call = getattr(overlap, name)
        counted = lambda *given, name=name, call=call: (called.append(name), call(*given))[1]  # noqa: E731
        monkeypatch.setattr(overlap, name, counted)
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 64, 7, 2, 3, bias=False).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    own = copy.deepcopy(plain)
    overlap.overlap_weight_gradients(own)
    overlap.take_own_stem(own)
    images = torch.randn(5, 3, 61, 70, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        one, other = plain(images), overlap.convolve(own, images)
    assert called == ["_stem"] and other.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other, one, rtol=2**-7, atol=1e-3)
    for result in (one, other):
        result.float().square().sum().backward()
    torch.cuda.synchronize()
    assert called == ["_stem", "_own_gradient"]
    assert own.weight.grad is not None and plain.weight.grad is not None
    allowed = 0.02 * float(plain.weight.grad.abs().max())
    torch.testing.assert_close(own.weight.grad, plain.weight.grad, rtol=0.02, atol=allowed)
