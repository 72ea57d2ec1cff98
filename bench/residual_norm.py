"""Residual sums with dropout and layer norm, and ReLU with dropout, of the transformer in training, both passes.

    python -m bench residual_norm [--rows N] [--dtype bfloat16] [--all-configs] [--rounds 9] [--device D] [--csv FILE]

PyTorch's operations, the same compiled, and `fastmetro_kernels.residual_norm` and `relu_dropout`, at the sizes of
FastMETRO-S and -L with 32 images: 445 joint and vertex tokens (50 camera and image tokens) of 512, 128 and 64 numbers,
the branch and the norm in half precision, the stream in it or in float32, a tenth dropped. "biased": with the bias of
the linear layer in front and its gradient; PyTorch's layers add it where they multiply, but sum its gradient so, too.
Without dropout each is held against float64 first. On a GPU each pass is a CUDA graph; microseconds, timed in turn.
"floor" is reading and writing what a pass has to once: stream, branch, new stream and norm; then the new stream, both
gradients, and those of stream and branch. With `--all-configs` every tile is a contender, too.
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
from fastmetro_kernels.dropout import relu_dropout
from fastmetro_kernels.residual_norm import ResidualNormConfig, residual_norm
from fastmetro_kernels.residual_norm.plan import CONFIGS

OURS = "ours"
COLUMNS = ("case", "dtype", "contender", "forward_us", "both_us", "forward_floor_us", "both_floor_us", "times_ours",
           "error")  # fmt: skip
P = 0.1
Op = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    """Rows of so many numbers; whether the stream is float32, or half precision; or a ReLU with dropout; with a bias of
    the linear layer in front."""

    rows: int
    width: int
    wide: bool = True
    relu: bool = False
    biased: bool = False

    def __str__(self) -> str:
        what = "relu_dropout" if self.relu else f"residual_norm, {'float32' if self.wide else 'half'} stream"
        return f"{self.rows} x {self.width} {what}{', biased' * self.biased}"


MESH, IMAGE = 32 * 445, 32 * 50
CASES = (
    *(Case(rows, width, wide) for rows, width in ((MESH, 512), (MESH, 128), (MESH, 64), (IMAGE, 512))
      for wide in (True, False)),
    *(Case(rows, width, biased=True) for rows, width in ((MESH, 512), (MESH, 128), (IMAGE, 512))),
    *(Case(MESH, 2048, relu=True, biased=biased) for biased in (False, True)),
)  # fmt: skip


def _add(branch: Tensor, branch_bias: Tensor | None) -> Tensor:
    """As a linear layer under autocast does it."""
    return branch if branch_bias is None else branch + branch_bias.to(branch.dtype)


def _plain(
    stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor | None = None, *, p: float
) -> tuple[Tensor, ...]:
    branch = _add(branch, branch_bias)
    new = stream + F.dropout(branch, p)
    return new, F.layer_norm(new.to(weight.dtype), new.shape[-1:], weight, bias).to(branch.dtype)


def _ours(
    stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor | None = None, *, p: float,
    config: ResidualNormConfig | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    options: dict[str, Any] = {"dropout_p": p, "dtype": branch.dtype, "config": config}
    return residual_norm(stream, branch, weight, bias, branch_bias=branch_bias, **options)


def _plain_relu(x: Tensor, bias: Tensor | None = None, *, p: float) -> tuple[Tensor, ...]:
    return (F.dropout(F.relu(_add(x, bias)), p),)


def _ours_relu(x: Tensor, bias: Tensor | None = None, *, p: float) -> tuple[Tensor, ...]:
    return (relu_dropout(x, p, bias=bias),)


def contenders(case: Case, device: torch.device, every: bool = False) -> dict[str, Op]:
    """By name."""
    plain, ours = (_plain_relu, _ours_relu) if case.relu else (_plain, _ours)
    found: dict[str, Op] = {"pytorch": plain}
    if device.type == "cuda":
        torch._dynamo.reset()  # else cases of more than eight kinds are not compiled any more
        found["pytorch, compiled"] = torch.compile(plain, dynamic=False)
    found[OURS] = ours
    if every and not case.relu:
        found |= {"x".join(map(str, one)): functools.partial(_ours, config=one) for one in CONFIGS}
    return found


def floors(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Microseconds of the forward pass, and of both."""
    half = dtype.itemsize
    one = 1e6 * case.rows * case.width / BYTES_PER_SECOND
    if case.relu:
        return 2 * half * one, 5 * half * one
    stream = 4 if case.wide else half
    return (2 * stream + 2 * half) * one, (2 * stream + 2 * half + 3 * stream + 2 * half) * one


def _tensors(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """What the op takes, and the gradients of what it returns."""
    generator = torch.Generator().manual_seed(0)

    def rows(kind: torch.dtype) -> Tensor:
        return torch.randn(case.rows, case.width, generator=generator).to(device, kind)

    def vectors(count: int) -> list[Tensor]:
        return [1 + 0.1 * torch.randn(case.width, generator=generator).to(device) for _ in range(count)]

    if case.relu:
        return [one.requires_grad_() for one in (rows(dtype), *vectors(case.biased))], [rows(dtype)]
    stream = torch.float32 if case.wide else dtype
    leaves = [rows(stream), rows(dtype), *vectors(2 + case.biased)]
    return [one.requires_grad_() for one in leaves], [rows(stream), rows(dtype)]


def _both(op: Op, leaves: Sequence[Tensor], grads: Sequence[Tensor], p: float) -> tuple[Tensor, ...]:
    """The results and the gradients."""
    outs = op(*leaves, p=p)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)


def errors(ops: dict[str, Op], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, float]:
    """The largest of the results and gradients without dropout, relative to float64.

    Raises:
        ValueError: one is more than twice that of PyTorch's operations.
    """
    doubles = [one.detach().double().requires_grad_() for one in leaves]
    exact = _both(ops["pytorch"], doubles, [one.double() for one in grads], 0.0)
    found: dict[str, list[float]] = {}
    for name, op in ops.items():
        pairs = zip(_both(op, leaves, grads, 0.0), exact, strict=True)
        found[name] = [float((one.double() - true).norm() / true.norm()) for one, true in pairs]
        allowed = [2 * plain + torch.finfo(grads[-1].dtype).eps for plain in found["pytorch"]]
        # The other way round than one is used to: also where an error is not a number.
        if not all(error <= most for error, most in zip(found[name], allowed, strict=True)):
            raise ValueError(f"{name}: errors of the results and their gradients are {found}")
    return {name: max(values) for name, values in found.items()}


def measure(
    case: Case, dtype: torch.dtype, rounds: int, device: torch.device, every: bool = False
) -> list[dict[str, Any]]:
    """A row per contender."""
    leaves, grads = _tensors(case, dtype, device)
    ops = contenders(case, device, every)
    wrong = errors(ops, leaves, grads)
    forward = {name: Timer([functools.partial(op, *leaves, p=P)], device) for name, op in ops.items()}  # type: ignore[list-item]
    both = {name: Timer([functools.partial(_both, op, leaves, grads, P)], device) for name, op in ops.items()}  # type: ignore[list-item]
    take_in_turn([*forward.values(), *both.values()], rounds)
    rows = []
    for name in ops:
        times = (forward[name].median, both[name].median, *floors(case, dtype))
        values = (str(case), str(dtype).removeprefix("torch."), name, *(f"{time:.4g}" for time in times),
                  f"{times[1] / both[OURS].median:.4g}", f"{wrong[name]:.2e}")  # fmt: skip
        row = dict(zip(COLUMNS, values, strict=True))
        print("  ".join(f"{value:>9}" for value in list(row.values())[:1] + list(row.values())[2:]), flush=True)
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = common.op_parser("residual_norm", __doc__)
    parser.add_argument("--rows", type=int, help="of every case, instead of those of the networks")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = []
    for case in CASES:
        one = case._replace(rows=options.rows) if options.rows else case
        rows += measure(one, dtype, options.rounds, device, options.all_configs)
    common.write_csv(options.csv or common.results_csv("residual_norm", device), rows)
