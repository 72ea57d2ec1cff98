"""What the tests of AdamW share: tensors of all kinds, AdamW in float64, and PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fused_cases import BFLOAT, DOUBLE, FLOAT, HALF, RUNNERS, Runner
from torch import Tensor

from fastmetro_kernels.adamw import AdamWGroup, Tables, adamw

_ONE_EACH = [runner for runner in RUNNERS if runner.dtype == FLOAT]
on_each = pytest.mark.parametrize("runner", _ONE_EACH, ids=str)
on_triton = pytest.mark.parametrize("runner", [one for one in _ONE_EACH if one.backend == "triton"], ids=str)
on_cuda = pytest.mark.parametrize("runner", [one for one in _ONE_EACH if one.device == "cuda"], ids=str)
LAST = torch.channels_last
# One number, odd sizes, whole chunks, some numbers more, several chunks.
SHAPES: list[tuple[int, ...]] = [(1,), (3, 5), (), (64,), (4096,), (4099,), (3, 64, 7, 7), (1024, 9), (16, 8, 1, 1)]
TYPES = (FLOAT, BFLOAT, HALF)
HYPER: dict[str, Any] = {"rate": 0.01, "betas": (0.9, 0.98), "epsilon": 1e-8, "weight_decay": 0.05}


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = FLOAT) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)), dtype=DOUBLE)
    drawn = drawn.to(device, dtype)
    return drawn.contiguous(memory_format=LAST) if len(shape) == 4 else drawn


def group_of(parameters: Sequence[Tensor], gradients: Sequence[Tensor], **options: Any) -> AdamWGroup:
    """Fresh moments; a rate becomes a tensor."""
    moments = [[torch.zeros_like(one) for one in parameters] for _ in range(2)]
    steps = [torch.zeros((), device=one.device) for one in parameters]
    given = HYPER | options
    if parameters and isinstance(given["rate"], float):
        given["rate"] = torch.tensor(given["rate"], device=parameters[0].device)
    return AdamWGroup(list(parameters), list(gradients), *moments, steps, **given)


def example(runner: Runner, shapes: Sequence[tuple[int, ...]] = SHAPES, **options: Any) -> AdamWGroup:
    """Parameters of these shapes, whose gradients have one type after the other."""
    parameters = [randn(*shape, seed=number, device=runner.device) for number, shape in enumerate(shapes)]
    return group_of(parameters, gradients(runner, shapes, 0), **options)


def gradients(runner: Runner, shapes: Sequence[tuple[int, ...]], step: int) -> list[Tensor]:
    types = [TYPES[number % 3] for number in range(len(shapes))]
    drawn = zip(shapes, types, strict=True)
    return [
        0.1 * randn(*shape, seed=100 * step + number + 50, device=runner.device).to(dtype)
        for number, (shape, dtype) in enumerate(drawn)
    ]


class Exact:
    """AdamW after algorithm 2 of Loshchilov and Hutter, in float64."""

    def __init__(self, groups: Sequence[AdamWGroup]) -> None:
        self.groups = groups
        self.parameters = [one.double().clone() for group in groups for one in group.parameters]
        self.first = [torch.zeros_like(one) for one in self.parameters]
        self.second = [torch.zeros_like(one) for one in self.parameters]
        self.steps = 0

    def step(self, found: Sequence[Tensor], max_norm: float | None) -> float:
        doubles = [one.double() for one in found]
        norm = math.sqrt(sum(float(one.square().sum()) for one in doubles))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        self.steps += 1
        owners = [group for group in self.groups for _ in group.parameters]
        for p, m, v, g, group in zip(self.parameters, self.first, self.second, doubles, owners, strict=True):
            (one, two), rate = group.betas, float(group.rate)
            m.mul_(one).add_((1 - one) * scale * g)
            v.mul_(two).add_((1 - two) * (scale * g).square())
            left, right = 1 - one**self.steps, 1 - two**self.steps
            p.sub_(rate * (m / left / ((v / right).sqrt() + group.epsilon) + group.weight_decay * p))
        return norm


def is_pytorchs_kernel(runner: Runner) -> bool:
    """Whether what runs is PyTorch's fused kernel for GPUs, which rounds more than its other ways to make the step."""
    return runner.backend == "reference" and runner.device == "cuda"


class Plain:
    """The same with PyTorch's optimizer and clipping, in float32; by its fused kernel where asked for."""

    def __init__(self, groups: Sequence[AdamWGroup], fused: bool) -> None:
        self.parameters = [one.clone() for group in groups for one in group.parameters]
        rest = iter(self.parameters)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [next(rest) for _ in group.parameters], "lr": float(group.rate), "betas": group.betas,
                 "eps": group.epsilon, "weight_decay": group.weight_decay}
                for group in groups
            ],
            fused=fused or None,
        )  # fmt: skip

    def step(self, found: Sequence[Tensor], max_norm: float | None) -> float:
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient.to(parameter.dtype).clone()
        norm = torch.nn.utils.get_total_norm([one.grad for one in self.parameters if one.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.optimizer.step()
        return float(norm)

    def moments(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[one][name] for one in self.parameters]


def assert_near(got: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], what: str) -> None:
    """No tensor further from float64 than twice PyTorch's float32 result of all tensors is, and a few roundings."""
    budget = 2 * max(float((near.double() - true).abs().max()) for near, true in zip(plain, exact, strict=True))
    for number, (found, true) in enumerate(zip(got, exact, strict=True)):
        allowed = budget + 4 * torch.finfo(FLOAT).eps * true.abs()
        error = (found.double() - true).abs()
        assert bool((error <= allowed).all()), f"{what} {number}: {float(error.max()):.3g}, budget {budget:.3g}"


def put(group: AdamWGroup, found: Sequence[Tensor]) -> None:
    for mine, new in zip(group.gradients, found, strict=True):
        mine.copy_(new)


def check(runner: Runner, groups: Sequence[AdamWGroup], draw: Callable[[int], list[Tensor]],
          max_norm: float | None, steps: int = 4) -> None:  # fmt: skip
    """Several steps with other gradients."""
    exact, plain, tables = Exact(groups), Plain(groups, is_pytorchs_kernel(runner)), Tables()
    for step in range(steps):
        found = draw(step)
        begin = 0
        for group in groups:
            put(group, found[begin : begin + len(group.parameters)])
            begin += len(group.parameters)
        norm = adamw(groups, max_norm=max_norm, tables=tables, backend=runner.backend)
        true, near = exact.step(found, max_norm), plain.step(found, max_norm)
        assert (norm is None) == (max_norm is None)
        if norm is not None:
            assert norm.dtype == FLOAT and abs(float(norm) - true) <= 2 * abs(near - true) + 4e-7 * true
    mine = [[one for group in groups for one in getattr(group, name)]
            for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps")]  # fmt: skip
    assert_near(mine[0], exact.parameters, plain.parameters, "parameter")
    assert_near(mine[1], exact.first, plain.moments("exp_avg"), "first moment")
    assert_near(mine[2], exact.second, plain.moments("exp_avg_sq"), "second moment")
    assert all(float(one) == steps for one in mine[3])
