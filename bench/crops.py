"""Crops of photographs on the device: PyTorch's operations, the same compiled, and the kernel.

    python -m bench crops [--batch 32 256] [--rounds 9] [--device cuda] [--csv FILE]

Boxes of 200 to 470 pixels of photographs of 640 x 480, augmented as in training, become crops of 224 x 224. Each result
is held against PyTorch's operations first, which the tests hold against float64. On a GPU each is a CUDA graph;
microseconds, timed in turn. "floor" is moving the pixels and the crops once.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import common
from bench.convolution.measure import Timer, take_in_turn
from bench.fused.basis import BYTES_PER_SECOND
from fastmetro.compat import Compat
from fastmetro.data.augmentation import PackedCuts, cut_image, draw_samples
from fastmetro.data.augmentation.affine import map_affine
from fastmetro.data.augmentation.published import map_published
from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN
from fastmetro_kernels.fused import render_crops
from fastmetro_kernels.fused.crops import reference

SIZE = 224
COLUMNS = ("batch", "compat", "contender", "us", "floor_us", "times_ours", "largest_difference")
MODES: tuple[Compat | None, ...] = (None, "published")


def make_cuts(batch: int, compat: Compat | None, seed: int = 0) -> PackedCuts:
    """Of random photographs; on the CPU."""
    random = np.random.default_rng(seed)
    draws = draw_samples(seed, list(range(batch)), "body")
    cuts = []
    for draw in draws:
        image = random.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        center, side = random.uniform((200, 180), (440, 300)), random.uniform(200, 470)
        cuts.append(cut_image(image, center, side / 200, draw, SIZE, compat))
    return PackedCuts.pack(cuts, draws)


def measure(batch: int, compat: Compat | None, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row per contender."""
    cuts = make_cuts(batch, compat).to(device)
    places = map_published(cuts.geometry, cuts.flip, SIZE) if compat else map_affine(cuts.geometry, SIZE)
    mean, deviation = (torch.tensor(one, device=device) for one in (IMAGE_MEAN, IMAGE_DEVIATION))
    given, constants = (cuts.pixels, cuts.offsets, cuts.sizes, places), (cuts.noise, mean, deviation)
    fixed = compat is not None
    plain = functools.partial(reference.render, *given, constants, fixed)
    calls: dict[str, Any] = {"pytorch": plain}
    if device.type == "cuda":
        compiled = torch.compile(reference.render, dynamic=False)
        calls["pytorch, compiled"] = functools.partial(compiled, *given, constants, fixed)
    calls["ours"] = functools.partial(render_crops, *given, *constants, fixed=fixed)
    truth: Tensor = plain()
    differences = {name: float((call() - truth).abs().max()) for name, call in calls.items()}
    if not max(differences.values()) <= 1e-4:
        raise ValueError(f"crops differ from PyTorch's: {differences}")
    timers = {name: Timer([call], device) for name, call in calls.items()}
    take_in_turn(list(timers.values()), rounds)
    floor = 1e6 * (cuts.pixels.numel() + 4 * truth.numel()) / BYTES_PER_SECOND
    rows = []
    for name, timer in timers.items():
        ratio = timer.median / timers["ours"].median
        row = dict(zip(COLUMNS, (batch, compat or "", name, f"{timer.median:.4g}", f"{floor:.4g}", f"{ratio:.4g}",
                                 f"{differences[name]:.1e}"), strict=True))  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        "python -m bench crops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rows = []
    for batch in options.batch:
        for compat in MODES:
            rows += measure(batch, compat, options.rounds, device)
    common.write_csv(options.csv or common.results_csv("crops", device), rows)
