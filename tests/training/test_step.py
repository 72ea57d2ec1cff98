"""One training step: parts of a batch, half precision, and the CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from small_network import MESH, SmallNetwork, labelled

from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import make_optimizer, set_learning_rate
from fastmetro.training.step import CapturedStep, TrainingStep, _alike

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(device="cpu", dropout: float = 0.0, capturable: bool = False, dtype=torch.float32, **options) -> TrainingStep:
    torch.manual_seed(0)
    model = SmallNetwork(dropout).to(device, dtype)
    optimizer = make_optimizer(model, 1e-2, 0.01, capturable=capturable)
    objective = Objective(MeshRecoveryLoss(MESH)).to(device, dtype)
    settings = {"clip": 1.0, "precision": "fp32", **options}
    return TrainingStep(model, model, objective, optimizer, **settings)


def batch(step: int, device="cpu", size: int = 12):
    return labelled(torch.arange(step * size, (step + 1) * size, device=device))


@pytest.mark.parametrize("accumulate", [2, 3, 5, 12])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(accumulate: int) -> None:
    """Also where the parts have different numbers of labels and different sizes."""
    whole, parts = make(dtype=torch.float64), make(dtype=torch.float64, accumulate=accumulate)
    for number in range(3):
        images, labels = batch(number)
        values = [step(images.double(), labels) for step in (whole, parts)]
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-7)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_parts_have_samples_of_all_sources() -> None:
    """In a batch those of each lie side by side, and batch norms see a part."""
    step, seen = make(accumulate=3), []
    forward = step.network
    step.network = lambda images: (seen.append(images.clone()), forward(images))[1]
    images, labels = batch(0)
    step(images, labels)
    assert len(seen) == 3 and all(torch.equal(part, images[number::3]) for number, part in enumerate(seen))


def test_values_are_named_and_true() -> None:
    step = make()
    images, labels = batch(0)
    loss, terms = step.objective(step.model(images), labels)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in step.parameters]).norm()
    values = dict(zip(step.names, step(images, labels).tolist(), strict=True))
    assert values["loss"] == pytest.approx(loss.item()) and values["gradient_norm"] == pytest.approx(norm.item())
    assert all(values[name] == pytest.approx(float(value)) for name, value in terms.items())


def test_the_gradient_is_clipped() -> None:
    step = make(clip=1e-3)
    step(*batch(0))
    norm = torch.stack([p.grad.norm() for p in step.parameters]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_half_precision_trains(device: torch.device) -> None:
    """The loss scale of float16 starts too high: steps that overflow are left out, and the norm says 0."""
    for precision in ("bf16", "fp16"):
        step = make(device, precision=precision)
        first, *_, last = (step(*batch(0, device)) for _ in range(60))
        assert last[0] < 0.7 * first[0], precision
        assert last.isfinite().all()
    assert step.scaler.get_scale() > 1


def test_a_rate_that_is_a_tensor_is_changed_in_place() -> None:
    optimizer = make_optimizer(SmallNetwork(), 1e-2, 0.0, decay="all", betas=(0.9, 0.999))
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25


@GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_captured_step_is_the_step(precision: str, accumulate: int) -> None:
    options = {"capturable": True, "precision": precision, "accumulate": accumulate}
    eager, other = make("cuda", **options), make("cuda", **options)
    eager(*batch(5, "cuda")), other(*batch(5, "cuda"))  # the optimizer has a past
    before = copy.deepcopy(other.model.state_dict())
    captured = CapturedStep(other, *batch(9, "cuda"))
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    for number in range(6):
        rate = 1e-2 / (1 + number)
        set_learning_rate(eager.optimizer, rate)
        set_learning_rate(other.optimizer, rate)
        expected = eager(*batch(number, "cuda"))
        torch.testing.assert_close(captured(*batch(number, "cuda")), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(eager.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@GPU
def test_a_captured_step_keeps_what_it_works_on() -> None:
    """A graph does not keep the weights that it was captured with; whoever has the step only may let go of them."""
    captured = CapturedStep(make("cuda", capturable=True), *batch(0, "cuda"))
    torch.cuda.empty_cache()
    poison = [torch.full((size,), torch.nan, device="cuda") for size in (16, 48, 256, 1024, 4096) for _ in range(64)]
    eager = make("cuda", capturable=True)
    for number in range(3):
        expected = eager(*batch(number, "cuda"))
        torch.testing.assert_close(captured(*batch(number, "cuda")), expected, rtol=1e-5, atol=1e-6)
    assert all(value.isnan().all() for value in poison)


@GPU
def test_a_captured_step_drops_other_units_each_time() -> None:
    step = make("cuda", dropout=0.5, capturable=True)
    set_learning_rate(step.optimizer, 0.0)
    captured = CapturedStep(step, *batch(0, "cuda"))
    losses = {captured(*batch(0, "cuda"))[0].item() for _ in range(5)}
    assert len(losses) == 5


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(ValueError, match="on a CUDA device only, got cpu"):
        CapturedStep(make(), *batch(0))


def test_what_takes_longest_to_copy_goes_first() -> None:
    tensors = {"flags": torch.ones(4, dtype=torch.bool), "few": torch.ones(2), "many": torch.ones(64)}
    tensors |= {"numbers": torch.ones(2, dtype=torch.int64), "more flags": torch.ones(2, dtype=torch.bool)}
    assert _alike(tensors) == [["few", "many"], ["numbers"], ["flags", "more flags"]]
