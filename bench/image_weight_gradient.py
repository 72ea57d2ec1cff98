"""The gradient of the weight of ResNet's first convolution, 7 x 7 with a stride of 2.

    python -m bench image_weight_gradient [--batch 32] [--dtype bfloat16] [--all-configs] [--rounds 9] [--device cuda]
                                          [--csv FILE]

PyTorch's (cuDNN's) and `fastmetro_kernels.image_weight_gradient`, each held against float64 first. On a GPU each is a
CUDA graph; microseconds, timed in turn. "floor" is reading the images and the gradient of the result. With
`--all-configs` every tile is a contender, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.convolution.measure import Timer, take_in_turn
from bench.fused.basis import BYTES_PER_SECOND
from fastmetro_kernels.image_weight_gradient import image_weight_gradient, reference
from fastmetro_kernels.image_weight_gradient.plan import CONFIGS

OURS = "ours"
COLUMNS = ("shape", "dtype", "contender", "us", "floor_us", "times_ours", "error")
OUTPUTS, KERNEL, STRIDE, PADDING = 64, 7, 2, 3
Call = Callable[[Tensor, Tensor], Tensor]


def contenders(every: bool = False) -> dict[str, Call]:
    """By name."""
    ours = functools.partial(image_weight_gradient, kernel=KERNEL, stride=STRIDE, padding=PADDING)
    tiles = {"x".join(map(str, one)): functools.partial(ours, config=one) for one in CONFIGS}
    plain = functools.partial(reference.weight_gradient, kernel=KERNEL, stride=STRIDE, padding=PADDING)
    return {"pytorch": plain, OURS: ours} | (tiles if every else {})


def errors(calls: dict[str, Call], x: Tensor, grad: Tensor) -> dict[str, float]:
    """Relative to float64.

    Raises:
        ValueError: an error is more than twice that of PyTorch's operation and a rounding.
    """
    exact = calls["pytorch"](x.double(), grad.double())
    found = {name: float((call(x, grad).double() - exact).norm() / exact.norm()) for name, call in calls.items()}
    wrong = [n for n, error in found.items() if not error <= 2 * found["pytorch"] + torch.finfo(x.dtype).eps]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: errors are {found}")
    return found


def measure(
    batch: int, size: int, dtype: torch.dtype, rounds: int, device: torch.device, every: bool = False
) -> list[dict[str, Any]]:
    """A row per contender."""
    generator = torch.Generator().manual_seed(0)
    result = (size + 2 * PADDING - KERNEL) // STRIDE + 1
    x, grad = (
        torch.randn(batch, side, side, channels, generator=generator).to(device, dtype).permute(0, 3, 1, 2)
        for side, channels in ((size, 3), (result, OUTPUTS))
    )
    calls = contenders(every)
    wrong = errors(calls, x, grad)
    timers = {name: Timer([functools.partial(call, x, grad)], device) for name, call in calls.items()}
    take_in_turn(list(timers.values()), rounds)
    floor = 1e6 * (x.numel() + grad.numel()) * x.element_size() / BYTES_PER_SECOND
    rows = []
    for name, timer in timers.items():
        values = ("x".join(map(str, x.shape)), str(dtype).removeprefix("torch."), name, f"{timer.median:.4g}",
                  f"{floor:.4g}", f"{timer.median / timers[OURS].median:.4g}", f"{wrong[name]:.2e}")  # fmt: skip
        row = dict(zip(COLUMNS, values, strict=True))
        print("  ".join(f"{value:>9}" for value in list(row.values())[2:]), flush=True)
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = common.op_parser("image_weight_gradient", __doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = measure(options.batch, options.size, dtype, options.rounds, device, options.all_configs)
    common.write_csv(options.csv or common.results_csv("image_weight_gradient", device), rows)


if __name__ == "__main__":
    main()
