"""How far engines are from the network that they were made of, on the shipped weights and on held-out images.

Beside the engines in half precision stand the network itself in the same type ("plain", all of its weights and
activations) and under autocast: what they are off is the type's doing, what an engine is off beyond that its own.

    python -m bench equality [--count 1000] [--dtype float32 float16 bfloat16] [--batch 50] [--device cuda] [--csv FILE]

Limits: float32 1e-5 m in every coordinate of every output; float16 and bfloat16 0.5 mm on average and 3 mm at most over
the distances of fine vertices. The exit status is 1 where an engine exceeds one. The network and the float32 engine run
without TF32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastmetro
from bench import common
from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.evaluation.synthetic import HELD_OUT_SEED
from fastmetro.inference.pretrained import load_pretrained
from fastmetro.models import FastMETRO
from fastmetro.profiling.latency import tensor_float_32

CHECKPOINT = "fastmetro-compact"
MESH = "pred_3d_vertices_fine"
DTYPES = ("float32", "float16", "bfloat16")
FLOAT32_METRES, HALF_MEAN_MM, HALF_LARGEST_MM = 1e-5, 0.5, 3.0


@dataclass
class Distance:
    """Of one contender over the images so far: millimetres between fine vertices, metres of any coordinate."""

    contender: str
    dtype: str
    total_mm: float = 0.0
    vertices: int = 0
    largest_mm: float = 0.0
    largest_coordinate: float = 0.0

    def add(self, outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Count one batch."""
        distances = 1e3 * (outputs[MESH].double() - expected[MESH].double()).norm(dim=-1)
        self.total_mm += float(distances.sum())
        self.vertices += distances.numel()
        self.largest_mm = float(np.maximum(self.largest_mm, float(distances.max())))  # NaN stays
        for name, value in expected.items():
            difference = float((outputs[name].double() - value.double()).abs().max())
            self.largest_coordinate = float(np.maximum(self.largest_coordinate, difference))

    @property
    def mean_mm(self) -> float:
        """Mean distance."""
        return self.total_mm / self.vertices

    @property
    def within(self) -> bool:
        """Whether the limits are kept; NaN is not."""
        if self.dtype == "float32":
            return self.largest_coordinate <= FLOAT32_METRES
        return self.mean_mm <= HALF_MEAN_MM and self.largest_mm <= HALF_LARGEST_MM


Call = Callable[[Tensor], dict[str, Tensor]]
"""From pixels [B, 3, 224, 224] to the published keys."""


def contenders(model: FastMETRO, batch: int, dtype: str) -> dict[str, Call]:
    """What computes in `dtype`, by name: the engine, and in half precision the network itself in two ways."""
    precision: torch.dtype = getattr(torch, dtype)
    engine = fastmetro.compile(model, batch, precision)
    calls: dict[str, Call] = {"engine": lambda pixels: engine(pixels.permute(0, 2, 3, 1).contiguous())}
    if precision == torch.float32:  # the network in float32 is what all are held against
        return calls
    plain: nn.Module = copy.deepcopy(model).to(precision)

    def autocast(pixels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(pixels.device.type, precision):
            outputs: dict[str, Tensor] = model(normalize_images(pixels))
        return outputs

    calls["plain"] = lambda pixels: plain(normalize_images(pixels).to(precision))
    calls["autocast"] = autocast
    return calls


@torch.no_grad()
def measure(count: int, batch: int, dtypes: Sequence[str], device: torch.device) -> list[Distance]:
    """Distances of the contenders of all `dtypes` over `count` images."""
    model = load_pretrained(CHECKPOINT).to(device)
    people = SyntheticPeople(model.mesh, seed=HELD_OUT_SEED).to(device)
    with tensor_float_32(False):  # engines keep the setting in which they are compiled
        calls = {
            (name, dtype): call
            for dtype in dtypes
            for name, call in contenders(model, min(batch, count), dtype).items()
        }
        distances = {key: Distance(*key) for key in calls}
        for indices in tqdm(torch.arange(count, device=device).split(batch), unit="batch", disable=None):
            pixels = people(indices).images
            expected = model(normalize_images(pixels))
            for key, call in calls.items():
                distances[key].add(call(pixels), expected)
    return list(distances.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(
        "python -m bench equality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="images")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="default: bench/results/equality_<cpu or cuda>.csv")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    distances = measure(options.count, options.batch, options.dtype, device)
    rows = []
    for one in distances:
        print(
            f"{one.contender:8} {one.dtype:8} mean {one.mean_mm:.4g} mm, largest {one.largest_mm:.4g} mm over fine "
            f"vertices; largest difference of a coordinate {one.largest_coordinate:.3g} m: "
            f"{'within' if one.within else 'BEYOND'} limits"
        )
        figures = {
            "mean_mm": f"{one.mean_mm:.4g}",
            "largest_mm": f"{one.largest_mm:.4g}",
            "largest_coordinate_m": f"{one.largest_coordinate:.3g}",
            "within": str(one.within),
        }
        named = {"contender": one.contender, "dtype": one.dtype, "images": str(options.count)}
        rows.append(named | figures | common.environment(device))
    common.write_csv(options.csv or common.RESULTS / f"equality_{device.type}.csv", rows)
    if not all(one.within for one in distances if one.contender == "engine"):
        raise SystemExit(1)
