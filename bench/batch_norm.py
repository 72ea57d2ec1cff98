"""Batch norms of ResNet-50 in training with residual and ReLU, forward and backward.

    python -m bench batch_norm [--batch 32] [--dtype bfloat16] [--all-configs] [--rounds 9] [--device cuda] [--csv FILE]

PyTorch's operations, the same compiled, and `fastmetro_kernels.batch_norm`, each held against float64 first. On a GPU
each pass is a CUDA graph; microseconds, timed in turn. "floor" is reading and writing what a pass has to once: x and
what is added, the result; then the gradient, x and the gradients; and a bit for each number where what the ReLU let
through cannot be made anew. The last lines add up all layers of the network, as often as it has them. With
`--all-configs` every tile is a contender, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import common
from bench.convolution.measure import Timer, take_in_turn
from bench.fused.basis import BYTES_PER_SECOND
from fastmetro_kernels.batch_norm import BatchNormConfig, ResidualNorm, batch_norm, make_counters
from fastmetro_kernels.batch_norm.plan import CONFIGS

OURS = "ours"
COLUMNS = ("layer", "times", "batch", "dtype", "contender", "forward_us", "both_us", "forward_floor_us",
           "both_floor_us", "times_ours", "error")  # fmt: skip


class Layer(NamedTuple):
    """Channels, height and width, what stands behind the norm, how many of these ResNet-50 has, and whether the
    residual has a norm of its own."""

    channels: int
    size: int
    residual: bool
    relu: bool
    times: int
    joint: bool = False

    def __str__(self) -> str:
        added = ", norm of residual" if self.joint else ", residual" * self.residual
        return f"{self.channels} x {self.size}^2{added}{', ReLU' * self.relu}"


LAYERS = (
    Layer(64, 112, False, True, 1), Layer(64, 56, False, True, 6), Layer(256, 56, True, True, 2),
    Layer(256, 56, True, True, 1, joint=True), Layer(128, 56, False, True, 1), Layer(128, 28, False, True, 7),
    Layer(512, 28, True, True, 3), Layer(512, 28, True, True, 1, joint=True), Layer(256, 28, False, True, 1),
    Layer(256, 14, False, True, 11), Layer(1024, 14, True, True, 5), Layer(1024, 14, True, True, 1, joint=True),
    Layer(512, 14, False, True, 1), Layer(512, 7, False, True, 5), Layer(2048, 7, True, True, 2),
    Layer(2048, 7, True, True, 1, joint=True),
)  # fmt: skip
Norm = Callable[..., Tensor]
"""Of x, weight, bias, and perhaps a residual, its weight and its bias."""


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None, *, relu: bool,
) -> Tensor:  # fmt: skip
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    if residual is not None and residual_weight is not None:
        residual = F.batch_norm(residual, None, None, residual_weight, residual_bias, training=True)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def _ours(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *second: Tensor, relu: bool,
    counters: Tensor, config: BatchNormConfig | None = None,
) -> Tensor:  # fmt: skip
    norm = ResidualNorm(*second) if second else None
    options = {"relu": relu, "counters": counters, "config": config}
    return batch_norm(x, weight, bias, residual=residual, residual_norm=norm, **options)


def contenders(layer: Layer, device: torch.device, every: bool = False) -> dict[str, Norm]:
    """By name."""
    plain = functools.partial(_plain, relu=layer.relu)
    found: dict[str, Norm] = {"pytorch": plain}
    if device.type == "cuda":
        found["pytorch, compiled"] = torch.compile(plain, dynamic=False)
    ours = functools.partial(_ours, relu=layer.relu, counters=make_counters(layer.channels, device))
    tiles = {"x".join(map(str, one)): functools.partial(ours, config=one) for one in CONFIGS}
    return found | {OURS: ours} | (tiles if every else {})


def floors(layer: Layer, batch: int, dtype: torch.dtype) -> tuple[float, float]:
    """Microseconds of the forward pass, and of both."""
    one = 1e6 * batch * layer.channels * layer.size**2 * dtype.itemsize / BYTES_PER_SECOND
    kept = layer.residual and layer.relu
    bits = kept * one / (8 * dtype.itemsize)
    return (2 + layer.residual) * one, (2 + layer.residual + 3 + kept + layer.joint) * one + 2 * bits


def _tensors(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def image() -> Tensor:
        drawn = torch.randn(batch, layer.size, layer.size, layer.channels, generator=generator)
        return drawn.to(device, dtype).permute(0, 3, 1, 2).requires_grad_()

    def vectors() -> list[Tensor]:
        return [make(layer.channels, device=device).requires_grad_() for make in (torch.ones, torch.zeros)]

    return [image(), *vectors(), *([image()] if layer.residual else []), *(vectors() if layer.joint else [])]


def _both(norm: Norm, tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients."""
    out = norm(*tensors)
    return out, *torch.autograd.grad(out, tensors, grad)


def measure(
    layer: Layer, batch: int, dtype: torch.dtype, rounds: int, device: torch.device, every: bool = False
) -> list[dict[str, Any]]:
    """A row per contender."""
    tensors = _tensors(layer, batch, dtype, device)
    grad = torch.randn_like(tensors[0].detach())
    norms = contenders(layer, device, every)
    exact_tensors = [one.detach().double().requires_grad_() for one in tensors]
    exact = [one.detach() for one in _both(functools.partial(_plain, relu=layer.relu), exact_tensors, grad.double())]
    errors = {}
    for name, norm in norms.items():
        found = zip(_both(norm, tensors, grad), exact, strict=True)
        errors[name] = [float((one.detach().double() - true).norm() / true.norm()) for one, true in found]
        allowed = [2 * plain + torch.finfo(dtype).eps for plain in errors["pytorch"]]
        # The other way round than one is used to: also where an error is not a number.
        if not all(error <= most for error, most in zip(errors[name], allowed, strict=True)):
            raise ValueError(f"{layer}: errors of the result and its gradients are {errors}")
    forward = {name: Timer([functools.partial(norm, *tensors)], device) for name, norm in norms.items()}  # type: ignore[arg-type]
    both = {name: Timer([functools.partial(_both, norm, tensors, grad)], device) for name, norm in norms.items()}  # type: ignore[list-item]
    take_in_turn([*forward.values(), *both.values()], rounds)
    rows = []
    least = floors(layer, batch, dtype)
    for name in norms:
        ratio = both[name].median / both[OURS].median
        values = (str(layer), layer.times, batch, str(dtype).removeprefix("torch."), name,
                  *(f"{time:.4g}" for time in (forward[name].median, both[name].median, *least)),
                  f"{ratio:.4g}", f"{max(errors[name]):.2e}")  # fmt: skip
        row = dict(zip(COLUMNS, values, strict=True))
        print("  ".join(f"{value:>9}" for value in list(row.values())[:1] + list(row.values())[4:]), flush=True)
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """All layers of the network together."""
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        sums = [sum(int(row["times"]) * float(row[column]) for row in own) for column in COLUMNS[5:9]]
        times = f"forward {sums[0]:7.0f} us, both {sums[1]:7.0f}"
        if len(own) < len({row["layer"] for row in rows}):
            continue
        lines.append(f"  {name:<18} {times}; floors {sums[2]:.0f}, {sums[3]:.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = common.op_parser("batch_norm", __doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only so many of them")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = []
    for layer in LAYERS[-options.layers :]:
        rows += measure(layer, options.batch, dtype, options.rounds, device, options.all_configs)
    print(summary(rows))
    common.write_csv(options.csv or common.results_csv("batch_norm", device), rows)
