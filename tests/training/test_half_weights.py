"""Half-precision copies of weights: what is trained with them, when they are used, whom they belong to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import BFLOAT, Trunk, assert_equal, backward, gradients_of, images, ours, places, trunk
from torch import Tensor

from fastmetro.models.backbones.half_weights import (
    HalfCopy,
    KeptFresh,
    half_copy,
    keep_half_weights,
    kept_weights,
    refresh_half_weights,
    usable_copy,
)
from fastmetro.models.backbones.overlap import overlap_weight_gradients


@pytest.fixture(autouse=True)
def _same_bits() -> Iterator[None]:
    """cuDNN may choose algorithms whose sums differ from call to call."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


@places
def test_copies_train_as_casts_do(device: str, backend: str) -> None:
    """To the bit in the forward pass, where they are used; the gradients stay in half precision."""
    if device == "cpu" and backend == "triton":
        pytest.skip("the interpreter rounds to bfloat16 in its own way")
    one, other = trunk(device, half=True), trunk(device)
    overlap_weight_gradients(other)
    first, second = ours(one, backend), ours(other, backend)
    for step in range(5):
        for module, optimizer in ((one, first), (other, second)):
            optimizer.zero_grad()
            backward(module, step, device)
        for (name, a), (_, b) in zip(gradients_of(one), gradients_of(other), strict=True):
            assert a.dtype == (torch.float32 if "head" in name else BFLOAT) and torch.equal(a.float(), b), name
        assert one.first.weight.grad is None and one.head.weight.grad is not None
        assert torch.equal(first.step_clipped(0.5), second.step_clipped(0.5))
        assert_equal(one, other)
        for weight, kept in kept_weights(one.parameters()):
            assert torch.equal(kept.tensor, weight.to(BFLOAT)) and not kept.is_stale(weight)


def test_the_gradient_is_not_copied_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the strides of axes of size 1 differ."""
    from fastmetro.models.backbones import overlap

    found: list[Tensor] = []
    original = overlap._gradient

    def noted(*given: Any) -> Tensor:
        result = original(*given)
        if given[-1] == 1:
            found.append(result)
        return result

    monkeypatch.setattr(overlap, "_gradient", noted)
    module = trunk(half=True)
    ours(module).zero_grad()  # which is gone at once: nobody writes the copies
    backward(module, 0)
    assert module.first.weight.grad is not None
    optimizer = ours(module)
    optimizer.zero_grad()
    found.clear()
    backward(module, 0)
    addresses = {one.data_ptr() for one in found}
    kept = [kept.tensor.grad for _, kept in kept_weights(module.parameters())]
    assert all(one is not None and one.data_ptr() in addresses for one in kept[1:])  # the 1 x 1 convolution


def test_a_second_gradient_adds_up_in_float32() -> None:
    one, other = trunk(half=True), trunk()
    overlap_weight_gradients(other)
    mine, plain = ours(one), ours(other)
    for module, optimizer in ((one, mine), (other, plain)):
        optimizer.zero_grad()
        backward(module, 0)
        backward(module, 1)
    assert half_copy(one.first.weight).tensor.grad is None  # type: ignore[union-attr]
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (
            a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad)
        )
    assert torch.equal(mine.step_clipped(0.1), plain.step_clipped(0.1))
    assert_equal(one, other)


def test_gradients_in_both_places_add_up() -> None:
    module = trunk(half=True)
    optimizer = ours(module)
    backward(module, 0)
    kept = half_copy(module.first.weight)
    assert kept is not None and kept.tensor.grad is not None
    expected = kept.tensor.grad.float() + 1
    module.first.weight.grad = torch.ones_like(module.first.weight)
    optimizer.step()
    assert kept.tensor.grad is None and torch.equal(module.first.weight.grad, expected)


CHANGES = {
    "in place": lambda module: module.first.weight.data_ptr() and _in_place(module),
    "load_state_dict": lambda module: module.load_state_dict(trunk(seed=9).state_dict()),
    "another dtype and back": lambda module: module.double().float(),
    "other strides": lambda module: module.to(memory_format=torch.contiguous_format),
    "other data": lambda module: setattr(module.first.weight, "data", module.first.weight.data * 2),
    "another optimizer": lambda module: _other_optimizer(module),
}


def _in_place(module: Trunk) -> None:
    with torch.no_grad():
        module.first.weight.mul_(2)


def _other_optimizer(module: Trunk) -> None:
    module.first.weight.grad = torch.ones_like(module.first.weight)
    torch.optim.SGD([module.first.weight], lr=0.1).step()
    module.first.weight.grad = None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stale_copy_is_not_used(change: Any) -> None:
    module = trunk(half=True)
    optimizer = ours(module)
    backward(module, 0)
    optimizer.step()
    optimizer.zero_grad()
    change(module)
    plain = copy.deepcopy(module)
    assert not kept_weights(plain.parameters())
    with torch.autocast("cpu", BFLOAT):
        assert torch.equal(module(images(1)), plain(images(1)))
    kept = half_copy(module.first.weight)
    assert kept is not None and kept.fits(module.first.weight) and not kept.is_stale(module.first.weight)
    backward(module, 1)
    optimizer.step()
    assert torch.equal(kept.tensor, module.first.weight.to(BFLOAT))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_all_copies_are_fresh_in_front_of_a_replay(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are looked at one by one only where something has changed since."""
    module, asked = trunk(half=True), []
    stale = HalfCopy.is_stale
    monkeypatch.setattr(HalfCopy, "is_stale", lambda kept, weight: (asked.append(kept), stale(kept, weight))[1])
    fresh = KeptFresh(module.parameters())
    fresh.refresh()
    assert len(asked) == 2
    for _ in range(2):
        change(module)  # which may leave a parameter as it is, at an address that is free again
        fresh.refresh()
        for weight, kept in kept_weights(module.parameters()):
            assert not stale(kept, weight) and torch.equal(kept.tensor, weight.to(BFLOAT))
        asked.clear()
        fresh.refresh()
        assert not asked


def test_copies_are_no_part_of_the_module() -> None:
    module, plain = trunk(half=True), trunk()
    optimizer = ours(module)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not list(module.buffers()) and usable_copy(module.first.weight, BFLOAT) is not None
    assert usable_copy(module.first.weight, torch.float16) is None
    other = pickle.loads(pickle.dumps(module))
    assert usable_copy(other.first.weight, BFLOAT) is None  # kept, but nobody writes it
    with torch.autocast("cpu", BFLOAT):
        assert torch.equal(other(images(0)), module(images(0)))
    backward(module, 0)
    assert keep_half_weights(module, None) == 2 and not kept_weights(module.parameters())
    assert module.first.weight.grad is not None and module.first.weight.grad.dtype == torch.float32
    optimizer.step_clipped(1.0)
    with pytest.raises(TypeError, match=r"dtype must be torch.bfloat16, torch.float16 or None, got torch.float32"):
        keep_half_weights(module, torch.float32)
    with pytest.raises(TypeError, match=r"weights must be float32, got torch.float64"):
        keep_half_weights(trunk().double())


def test_copies_in_evaluation_and_in_float32() -> None:
    """They are not used, and written all the same."""
    module, plain = trunk(half=True), trunk()
    optimizer = ours(module)
    assert torch.equal(module(images(0)), plain(images(0)))
    module(images(0)).square().sum().backward()
    assert module.first.weight.grad is not None
    optimizer.step_clipped(1.0)
    for weight, kept in kept_weights(module.parameters()):
        assert torch.equal(kept.tensor, weight.to(BFLOAT)) and kept.tensor.grad is None


def test_refreshing_keeps_the_memory() -> None:
    module = trunk(half=True)
    addresses = [kept.tensor.data_ptr() for _, kept in kept_weights(module.parameters())]
    for weight in module.parameters():
        weight.data.mul_(3)  # which PyTorch does not count
    assert not half_copy(module.first.weight).is_stale(module.first.weight)  # type: ignore[union-attr]
    assert refresh_half_weights(module) == 2
    for address, (weight, kept) in zip(addresses, kept_weights(module.parameters()), strict=True):
        assert kept.tensor.data_ptr() == address and torch.equal(kept.tensor, weight.to(BFLOAT))
