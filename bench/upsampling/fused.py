"""What fusing the upsampling with the layer before it could save at most: `python -m bench upsampling --fused`.

FastMETRO ends in a Linear that turns the features of the coarse vertices into positions, then upsamples those. A fused
kernel would read what the Linear reads and write what the upsampling writes, so it cannot be faster than the slower of
the two: the most it can save is the time of both, one after the other, less that of the slower one. "bound" is that
time. Blocks that share a coarse vertex would each have to compute it, which is not counted in favour of the two calls.

The released code also has learned dense Linears along the vertices in place of the fixed matrices. Those are matrix
products; at inference both are one, of the product of their weights ("folded").
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import common
from bench.upsampling.cases import matrices
from fastmetro_kernels import SparseMatrix, sparse_upsample

WIDTHS = (128, 512)
FUSABLE = ("1723->6890", "431->6890")
CALLS, ROUNDS = 64, 20


@dataclass(frozen=True)
class Layers:
    """The regressor, the matrix behind it, and one batch of features."""

    matrix: SparseMatrix
    weight: Tensor
    bias: Tensor
    features: Tensor

    def regress(self) -> Tensor:
        """Positions of the coarse vertices."""
        return torch.nn.functional.linear(self.features, self.weight, self.bias)

    def upsample(self, coarse: Tensor) -> Tensor:
        """Positions of the fine vertices."""
        return sparse_upsample(coarse, self.matrix)

    def both(self) -> Tensor:
        """Two calls."""
        return self.upsample(self.regress())


def layers(matrix: SparseMatrix, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Layers:
    """Random weights and features."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return Layers(matrix, randn(3, width) * width**-0.5, randn(3), randn(batch, matrix.shape[1], width))


def timed(runs: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Microseconds of each in a CUDA graph (on a CPU as single calls), round by round."""
    for run in runs.values():
        run()
    if device.type == "cuda":
        graphs = {name: common.capture([run] * CALLS) for name, run in runs.items()}
        samples = {name: [graph.milliseconds() for _ in range(ROUNDS)] for name, graph in graphs.items()}
    else:
        samples = {name: [common.milliseconds(run, device) for _ in range(ROUNDS)] for name, run in runs.items()}
    return {name: statistics.median(times) * 1e3 for name, times in samples.items()}


def row(matrix: SparseMatrix, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Times of the two calls, alone and one after the other, and what fusing them could save."""
    made = layers(matrix, batch, width, dtype, device)
    coarse = made.regress()
    times = timed(
        {"linear": made.regress, "upsample": functools.partial(made.upsample, coarse), "both": made.both}, device
    )
    bound = max(times["linear"], times["upsample"])
    return {**times, "bound": bound, "saved": times["both"] - bound}


def learned(batch: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The released code's learned Linears along the vertices, in two steps and folded into one."""
    generator = torch.Generator(device).manual_seed(0)
    coarse, middle, fine = sizes
    x = torch.randn((batch, 3, coarse), generator=generator, device=device).to(dtype)
    first = torch.randn((middle, coarse), generator=generator, device=device).to(dtype)
    second = torch.randn((fine, middle), generator=generator, device=device).to(dtype)
    folded = second @ first
    linear = torch.nn.functional.linear
    return timed({"steps": lambda: linear(linear(x, first), second), "folded": lambda: linear(x, folded)}, device)


@torch.no_grad()
def main(data: Path, dtypes: Sequence[str], batches: Sequence[int], device: torch.device) -> None:
    """Print both tables."""
    print("microseconds: regressor Linear(width, 3), then upsampling; at most `saved` by fusing them")
    layout = "  {:<24} {:<9} {:>6} {:>6} {:>8} {:>9} {:>8} {:>8} {:>8}"
    print(layout.format("matrix", "dtype", "batch", "width", "linear", "upsample", "both", "bound", "saved"))
    for name, matrix in matrices(data, list(FUSABLE)):
        for dtype in dtypes:
            for batch in batches:
                for width in WIDTHS:
                    found = row(matrix.to(device), batch, width, getattr(torch, dtype), device)
                    cells = [f"{found[key]:.2f}" for key in ("linear", "upsample", "both", "bound", "saved")]
                    print(layout.format(name, dtype, batch, width, *cells), flush=True)
    print("\nmicroseconds: the released code's learned Linears 431 -> 1723 -> 6890")
    for dtype in dtypes:
        for batch in batches:
            found = learned(batch, (431, 1723, 6890), getattr(torch, dtype), device)
            times = f"steps {found['steps']:.2f}, folded {found['folded']:.2f}"
            print(f"  {dtype:<9} batch {batch:>4}: {times}", flush=True)
