"""How far engines are from the network that they were made of, on the shipped weights and on held-out images.

    python -m bench equality [--count 1000] [--dtype float32 float16 bfloat16] [--batch 50] [--device cuda] [--csv FILE]

Limits: float32 1e-5 m in every coordinate of every output; float16 and bfloat16 0.5 mm on average and 3 mm at most over
the distances of fine vertices. The exit status is 1 where one is exceeded. The network runs in float32 without TF32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastmetro
from bench import common
from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.evaluation.synthetic import HELD_OUT_SEED
from fastmetro.inference.engine import Engine
from fastmetro.inference.pretrained import load_pretrained
from fastmetro.profiling.latency import tensor_float_32

CHECKPOINT = "fastmetro-compact"
MESH = "pred_3d_vertices_fine"
DTYPES = ("float32", "float16", "bfloat16")
FLOAT32_METRES, HALF_MEAN_MM, HALF_LARGEST_MM = 1e-5, 0.5, 3.0


@dataclass
class Distance:
    """Of one engine over the images so far: millimetres between fine vertices, metres of any coordinate."""

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


@torch.no_grad()
def measure(count: int, batch: int, dtypes: Sequence[str], device: torch.device) -> list[Distance]:
    """Distances of the engines of all `dtypes` over `count` images."""
    model = load_pretrained(CHECKPOINT).to(device)
    people = SyntheticPeople(model.mesh, seed=HELD_OUT_SEED).to(device)
    engines: list[Engine] = [fastmetro.compile(model, min(batch, count), getattr(torch, dtype)) for dtype in dtypes]
    distances = [Distance(dtype) for dtype in dtypes]
    with tensor_float_32(False):
        for indices in tqdm(torch.arange(count, device=device).split(batch), unit="batch", disable=None):
            pixels = people(indices).images
            expected = model(normalize_images(pixels))
            for engine, distance in zip(engines, distances, strict=True):
                distance.add(engine(pixels.permute(0, 2, 3, 1).contiguous()), expected)
    return distances


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
            f"{one.dtype:9} mean {one.mean_mm:.4g} mm, largest {one.largest_mm:.4g} mm over fine vertices; largest "
            f"difference of a coordinate {one.largest_coordinate:.3g} m: {'within' if one.within else 'BEYOND'} limits"
        )
        figures = {
            "mean_mm": f"{one.mean_mm:.4g}",
            "largest_mm": f"{one.largest_mm:.4g}",
            "largest_coordinate_m": f"{one.largest_coordinate:.3g}",
            "within": str(one.within),
        }
        rows.append({"dtype": one.dtype, "images": str(options.count)} | figures | common.environment(device))
    common.write_csv(options.csv or common.RESULTS / f"equality_{device.type}.csv", rows)
    if not all(one.within for one in distances):
        raise SystemExit(1)
