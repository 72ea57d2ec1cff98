"""ClippedAdamW: PyTorch's AdamW by its states and results, and half-precision copies that it writes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_network import MESH, SmallNetwork, labelled
from torch import Tensor, nn

from fastmetro.distributed import World
from fastmetro.models.backbones.half_weights import (
    half_copy,
    keep_half_weights,
    kept_weights,
    refresh_half_weights,
    usable_copy,
)
from fastmetro.models.backbones.overlap import convolve, overlap_weight_gradients
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.optimizer import ClippedAdamW
from fastmetro.training.schedule import make_optimizer, set_learning_rate
from fastmetro.training.state import ExponentialAverage, TrainState
from fastmetro.training.step import CapturedStep, TrainingStep
from fastmetro_kernels.backends import triton_reasons

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BFLOAT = torch.bfloat16
_PLACES = [(device, backend) for device in ("cpu", "cuda") for backend in ("reference", "triton")]
PLACES = [
    (device, backend)
    for device, backend in _PLACES
    if (device == "cpu" or torch.cuda.is_available())
    and (backend == "reference" or not triton_reasons(torch.device(device)))
]
places = pytest.mark.parametrize(("device", "backend"), PLACES, ids="-".join)


class Trunk(nn.Module):
    """Two convolutions of which the second has strides that mean nothing, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.second, torch.tanh(convolve(self.first, x)))
        return self.head(y.float().mean((2, 3)))


def trunk(device: str = "cpu", seed: int = 0, half: bool = False) -> Trunk:
    torch.manual_seed(seed)
    module = Trunk().to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if half:
        overlap_weight_gradients(module)
        assert keep_half_weights(module, BFLOAT) == 2
    return module


def images(step: int, device: str = "cpu") -> Tensor:
    drawn = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return drawn.to(device).contiguous(memory_format=torch.channels_last)


def backward(module: nn.Module, step: int, device: str = "cpu") -> None:
    with torch.autocast(device, BFLOAT):
        out = module(images(step, device))
    out.float().square().sum().backward()


def groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices = [one for one in module.parameters() if one.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [one for one in module.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]


def theirs(module: nn.Module, rate: float | Tensor = 0.01, capturable: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(module), lr=rate, betas=(0.9, 0.98), fused=True, capturable=capturable)


def ours(module: nn.Module, backend: str = "auto", rate: float | Tensor = 0.01) -> ClippedAdamW:
    return ClippedAdamW(groups(module), lr=rate, betas=(0.9, 0.98), backend=backend)


def gradients_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        kept = half_copy(parameter)
        found = parameter.grad if kept is None or kept.tensor.grad is None else kept.tensor.grad
        assert found is not None, name
        yield name, found


def assert_equal(one: nn.Module, other: nn.Module, exactly: bool = True) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if exactly:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@places
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_steps_are_those_of_pytorch(device: str, backend: str, max_norm: float | None) -> None:
    one, other = trunk(device), trunk(device)
    mine, plain = ours(one, backend), theirs(other)
    for step in range(4):
        for module, optimizer in ((one, mine), (other, plain)):
            optimizer.zero_grad()
            backward(module, step, device)
        if max_norm is None:
            assert mine.step() is None
        else:
            norm = mine.step_clipped(max_norm)
            expected = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        plain.step()
        assert_equal(one, other, exactly=backend == "reference" and device == "cpu" and step == 0)
        assert_equal(one, other, exactly=False)


def test_a_closure() -> None:
    module = trunk()
    optimizer = ours(module)

    def closure() -> float:
        backward(module, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0 and len(optimizer.state) == 4


def test_the_layout_of_states_is_pytorchs() -> None:
    one, other = trunk(), trunk()
    mine, plain = ours(one), theirs(other)
    backward(one, 0), mine.step()
    backward(other, 0), plain.step()
    a, b = mine.state_dict(), plain.state_dict()
    for x, y in zip(a["param_groups"], b["param_groups"], strict=True):
        assert x == y | {"capturable": True}
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"] == list(b["state"][number])
        for name, value in state.items():
            same = b["state"][number][name]
            assert value.dtype == same.dtype and value.shape == same.shape and value.stride() == same.stride()
    assert not torch.equal(trunk().first.weight, one.first.weight)


@places
@pytest.mark.parametrize("direction", ["to ours", "to theirs", "ours to ours"])
def test_checkpoints_of_either_load_into_the_other(device: str, backend: str, direction: str, tmp_path: Path) -> None:
    """And what goes on from them is what goes on without."""
    makers = {"ours": lambda module: ours(module, backend), "theirs": theirs}
    first, second = {"to ours": ("theirs", "ours"), "to theirs": ("ours", "theirs")}.get(direction, ("ours", "ours"))
    one = trunk(device)
    optimizer = makers[first](one)

    def train(module: nn.Module, by: Any, steps: range) -> None:
        for step in steps:
            by.zero_grad()
            backward(module, step, device)
            by.step()

    train(one, optimizer, range(3))
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(one, optimizer, range(3, 6))
    content = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    other = trunk(device, seed=5)
    other.load_state_dict(content["model"])
    resumed = makers[second](other)
    resumed.load_state_dict(content["optimizer"])
    train(other, resumed, range(3, 6))
    assert_equal(one, other, exactly=first == second)
    assert_equal(one, other, exactly=False)
    assert all(float(state["step"]) == 6 for state in resumed.state.values())


def test_states_of_other_layouts_and_kinds() -> None:
    """PyTorch's optimizer as it is by default counts on the host; moments may have been saved with other strides."""
    module = trunk()
    plain = torch.optim.AdamW(groups(module), lr=0.3)
    backward(module, 0), plain.step()
    state = plain.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].contiguous()
    mine = ours(module)
    mine.load_state_dict(state)
    assert mine.param_groups[0]["lr"] == 0.3 and mine.param_groups[0]["fused"] and mine.param_groups[0]["capturable"]
    assert mine.state[module.first.weight]["exp_avg"].stride() == module.first.weight.stride()
    backward(module, 1), mine.step_clipped(1.0)
    for name in ("amsgrad", "maximize"):
        other = torch.optim.AdamW(groups(module), **{name: True})
        with pytest.raises(ValueError, match=f"a state with {name} does not fit"):
            mine.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="a state of Adam, whose weight decay is part of the gradient"):
        mine.load_state_dict(torch.optim.Adam(groups(module)).state_dict())


@pytest.mark.parametrize("fused", ["torch", "project"])
def test_a_rate_that_is_a_tensor_stays_it(fused: Any, tmp_path: Path) -> None:
    """PyTorch's own optimizer would take the file's, which is on the CPU: a graph would be captured with a number."""

    def state(rate: float) -> TrainState:
        model = SmallNetwork()
        optimizer = make_optimizer(model, rate, 0.0, capturable=True, fused=fused)
        return TrainState(model, ExponentialAverage(model, 0.9), optimizer)

    state(0.25).save(tmp_path / "checkpoint.pt", {})
    resumed = state(0.5)
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    resumed.load(tmp_path / "checkpoint.pt", {})
    for rate, group in zip(rates, resumed.optimizer.param_groups, strict=True):
        assert group["lr"] is rate and float(rate) == 0.25
    set_learning_rate(resumed.optimizer, 0.125)
    assert float(rates[0]) == 0.125


def test_copies_of_the_optimizer_work() -> None:
    module = trunk()
    optimizer = ours(module, "reference")
    backward(module, 0), optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (parameter, *_), *_ = (group["params"] for group in other.param_groups)
        before, parameter.grad = parameter.detach().clone(), torch.ones_like(parameter)
        other.step_clipped(1.0)
        assert other._backend == "reference" and not torch.equal(parameter, before)


def test_what_does_not_fit_is_named() -> None:
    module = trunk()
    with pytest.raises(ValueError, match="betas must be two numbers"):
        ClippedAdamW(module.parameters(), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="rate must be finite and at least 0"):
        ClippedAdamW(module.parameters(), lr=-1.0)
    with pytest.raises(TypeError, match=r"parameters must be float32 or float64, got torch\.float16"):
        ClippedAdamW([nn.Parameter(torch.zeros(3).half())])
    with pytest.raises(ValueError, match="parameters must be on one device, got cpu, meta"):
        ClippedAdamW([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(ValueError, match="lr must be on cpu, as the parameters, got meta"):
        ClippedAdamW(module.parameters(), lr=torch.zeros((), device="meta"))
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        ours(module).step_clipped(-1.0)
    with pytest.raises(ValueError, match="fused must be one of 'auto', 'torch', 'project', got 'ours'"):
        make_optimizer(module, 0.1, 0.0, fused="ours")  # type: ignore[arg-type]


def test_which_optimizer_is_made() -> None:
    module = SmallNetwork()
    assert isinstance(make_optimizer(module, 0.1, 0.0), torch.optim.AdamW)
    assert isinstance(make_optimizer(module, 0.1, 0.0, fused="auto"), torch.optim.AdamW)  # on a CPU
    made = make_optimizer(module, 0.1, 0.5, fused="project", betas=(0.8, 0.9))
    assert isinstance(made, ClippedAdamW) and made.param_groups[0]["betas"] == (0.8, 0.9)
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.0]


# Half-precision copies.


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


# Training steps.


class ConvolutionalNetwork(SmallNetwork):
    """The small network behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(convolve(self.convolution, images).float())


def make(device: str = "cpu", half: bool = True, fused: str = "project", capturable: bool = False,
         **options: Any) -> TrainingStep:  # fmt: skip
    torch.manual_seed(0)
    model = ConvolutionalNetwork().to(device)
    overlap_weight_gradients(model)
    if half:
        keep_half_weights(model)
    optimizer = make_optimizer(model, 1e-2, 0.01, fused=fused, capturable=capturable)  # type: ignore[arg-type]
    settings = {"clip": 1.0, "precision": "bf16", **options}
    return TrainingStep(model, model, Objective(MeshRecoveryLoss(MESH)).to(device), optimizer, **settings)  # type: ignore[arg-type]


def batch(number: int, device: str = "cpu") -> Any:
    return labelled(torch.arange(number * 12, (number + 1) * 12, device=device))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("half", [False, True])
def test_steps_are_those_of_clip_and_scaler(accumulate: int, precision: str, half: bool, device: torch.device) -> None:
    options: Any = {"accumulate": accumulate, "precision": precision, "clip": 0.2}
    one, other = make(device.type, half, **options), make(device.type, False, "torch", **options)
    for number in range(4):
        values = [step(*batch(number, device.type)) for step in (one, other)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    assert float(values[0][1]) > 0.2
    assert_equal(one.model, other.model, exactly=False)


def test_fp16_is_left_to_the_scaler(device: torch.device) -> None:
    one, other = (make(device.type, False, fused, precision="fp16") for fused in ("project", "torch"))
    for number in range(4):
        values = [step(*batch(number, device.type)) for step in (one, other)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    assert_equal(one.model, other.model, exactly=False)


def test_half_weights_that_would_lose_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="half-precision weights need ClippedAdamW, got AdamW"):
        make(fused="torch")
    with pytest.raises(ValueError, match="do not go with precision fp16"):
        make(precision="fp16")
    with pytest.raises(ValueError, match="are for one process, got 2"):
        make(world=World(0, 2))
    step = make(half=False, fused="torch")
    keep_half_weights(step.model)
    with pytest.raises(ValueError, match="need ClippedAdamW"):
        step(*batch(0))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, device: torch.device) -> None:
    """With copies that are of other weights when the checkpoint is loaded."""

    def state_of(step: TrainingStep) -> TrainState:
        return TrainState(step.model, ExponentialAverage(step.model, 0.9), step.optimizer)

    whole = make(device.type)
    for number in range(3):
        whole(*batch(number, device.type))
    state_of(whole).save(tmp_path / "checkpoint.pt", {})
    expected = [whole(*batch(number, device.type)) for number in range(3, 6)]
    resumed = make(device.type)
    resumed(*batch(7, device.type))
    state_of(resumed).load(tmp_path / "checkpoint.pt", {})
    for weight, kept in kept_weights(resumed.parameters):
        assert torch.equal(kept.tensor, weight.to(BFLOAT))
    for number, values in zip(range(3, 6), expected, strict=True):
        assert torch.equal(resumed(*batch(number, device.type)), values)
    assert_equal(whole.model, resumed.model)


@GPU
@pytest.mark.parametrize("half", [False, True])
def test_a_captured_step_is_the_step(half: bool) -> None:
    eager, other = (make("cuda", half, capturable=True) for _ in range(2))
    eager(*batch(5, "cuda")), other(*batch(5, "cuda"))  # the optimizer has a past
    before = copy.deepcopy(other.model.state_dict())
    captured = CapturedStep(other, *batch(9, "cuda"))
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    for number in range(8):
        for step in (eager, other):
            set_learning_rate(step.optimizer, 1e-2 / (1 + number))
        if number == 4:  # someone else changes the weights of both
            for step in (eager, other):
                with torch.no_grad():
                    for parameter in step.parameters:
                        parameter.mul_(1.25)
        expected = eager(*batch(number, "cuda"))
        torch.testing.assert_close(captured(*batch(number, "cuda")), expected, rtol=1e-5, atol=1e-6)
        for weight, kept in kept_weights(other.parameters):
            assert torch.equal(kept.tensor, weight.to(BFLOAT))
    assert_equal(eager.model, other.model, exactly=False)
    assert math.isfinite(float(expected[0]))


@GPU
def test_what_a_graph_would_not_see_is_refused() -> None:
    module = trunk("cuda")
    for optimizer, message in (
        (ours(module), "lr must be a tensor"),
        (ours(module, rate=torch.tensor(0.1, device="cuda")), "a parameter has no moments"),
    ):
        backward(module, 0, "cuda")
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
