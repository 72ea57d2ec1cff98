"""The max pool of ResNet-50's stem in training, forward and backward.

    python -m bench max_pool [--batch 32] [--dtype bfloat16] [--all-configs] [--rounds 9] [--device cuda] [--csv FILE]

PyTorch's operation, the same compiled, and `fastmetro_kernels.max_pool`, each held against float64 first: maxima have
to be equal. On a GPU each pass is a CUDA graph; microseconds, timed in turn. "floor" is reading x and writing the
maxima with a byte each; then reading their gradient and the bytes, and writing the gradient of x. With `--all-configs`
every tile is a contender, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import common
from bench.convolution.measure import Timer, take_in_turn
from bench.fused.basis import BYTES_PER_SECOND
from fastmetro_kernels.max_pool import MaxPoolConfig, max_pool
from fastmetro_kernels.max_pool.plan import CONFIGS

OURS = "ours"
COLUMNS = ("shape", "dtype", "contender", "forward_us", "both_us", "forward_floor_us", "both_floor_us", "times_ours",
           "error")  # fmt: skip
CHANNELS, SIZE = 64, 112
Pool = Callable[[Tensor], Tensor]


def _plain(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def _ours(x: Tensor, config: MaxPoolConfig | None = None) -> Tensor:
    return max_pool(x, config=config)


def contenders(device: torch.device, every: bool = False) -> dict[str, Pool]:
    """By name."""
    found: dict[str, Pool] = {"pytorch": _plain}
    if device.type == "cuda":
        found["pytorch, compiled"] = torch.compile(_plain, dynamic=False)
    tiles = {"x".join(map(str, one)): functools.partial(_ours, config=one) for one in CONFIGS}
    return found | {OURS: _ours} | (tiles if every else {})


def floors(x: Tensor) -> tuple[float, float]:
    """Microseconds of the forward pass, and of both."""
    results = x.numel() // 4
    one = 1e6 * (x.numel() * x.element_size() + results * (x.element_size() + 1)) / BYTES_PER_SECOND
    return one, 2 * one


def _both(pool: Pool, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the gradient."""
    out = pool(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def errors(pools: dict[str, Pool], x: Tensor, grad: Tensor) -> dict[str, float]:
    """Of the gradient, relative to float64.

    Raises:
        ValueError: maxima are not equal, or an error is more than twice that of PyTorch's operation.
    """
    maxima, exact = _both(_plain, x.detach().double().requires_grad_(), grad.double())
    found: dict[str, float] = {}
    for name, pool in pools.items():
        out, gradient = _both(pool, x, grad)
        found[name] = float((gradient.double() - exact).norm() / exact.norm())
        # The other way round than one is used to: also where an error is not a number.
        if not (torch.equal(out.double(), maxima) and found[name] <= 2 * found["pytorch"] + torch.finfo(x.dtype).eps):
            raise ValueError(f"{name}: not PyTorch's maxima, or errors of the gradients are {found}")
    return found


def measure(
    batch: int, size: int, dtype: torch.dtype, rounds: int, device: torch.device, every: bool = False
) -> list[dict[str, Any]]:
    """A row per contender."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batch, size, size, CHANNELS, generator=generator).relu()  # with as many ties as behind a ReLU
    x = drawn.to(device, dtype).permute(0, 3, 1, 2).requires_grad_()
    grad = torch.randn_like(_plain(x.detach()))
    pools = contenders(device, every)
    wrong = errors(pools, x, grad)
    forward = {name: Timer([functools.partial(pool, x)], device) for name, pool in pools.items()}
    both = {name: Timer([functools.partial(_both, pool, x, grad)], device) for name, pool in pools.items()}
    take_in_turn([*forward.values(), *both.values()], rounds)
    rows = []
    for name in pools:
        times = (forward[name].median, both[name].median, *floors(x))
        values = ("x".join(map(str, x.shape)), str(dtype).removeprefix("torch."), name,
                  *(f"{time:.4g}" for time in times), f"{times[1] / both[OURS].median:.4g}",
                  f"{wrong[name]:.2e}")  # fmt: skip
        row = dict(zip(COLUMNS, values, strict=True))
        print("  ".join(f"{value:>9}" for value in list(row.values())[2:]), flush=True)
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = common.op_parser("max_pool", __doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=SIZE, help="height and width")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = measure(options.batch, options.size, dtype, options.rounds, device, options.all_configs)
    common.write_csv(options.csv or common.results_csv("max_pool", device), rows)
