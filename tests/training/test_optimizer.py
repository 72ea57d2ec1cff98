"""ClippedAdamW is PyTorch's AdamW by its states and results, alone and in training steps."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import BFLOAT, GPU, assert_equal, backward, groups, ours, places, theirs, trunk
from small_network import MESH, ConvolutionalNetwork, SmallNetwork, labelled
from torch import nn

from fastmetro.models.backbones.half_weights import keep_half_weights, kept_weights
from fastmetro.models.backbones.overlap import overlap_weight_gradients
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.optimizer import ClippedAdamW
from fastmetro.training.schedule import make_optimizer, set_learning_rate
from fastmetro.training.state import ExponentialAverage, TrainState
from fastmetro.training.step import CapturedStep, TrainingStep


@pytest.fixture(autouse=True)
def _same_bits() -> Iterator[None]:
    """cuDNN may choose algorithms whose sums differ from call to call."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


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
        # A rounding of a parameter may be one of half precision in the next pass, and AdamW sees ratios of gradients.
        assert_equal(one.model, other.model, exactly=False, atol=1e-6 if number == 0 else 1e-4)


def test_half_weights_that_would_lose_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="half-precision weights need ClippedAdamW, got AdamW"):
        make(fused="torch")
    with pytest.raises(ValueError, match="do not go with precision fp16"):
        make(precision="fp16")
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
