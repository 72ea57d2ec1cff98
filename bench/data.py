"""Training from TSV files on disk: is the GPU busy, and what does a worker manage?

    python -m bench data [--workers 0 2 4 8 16] [--pixels worker device] [--batch 32] [--steps 200] [--rows 512]
                         [--model fastmetro-s] [--backbone resnet50] [--device cuda] [--csv FILE]

Writes a data set of synthetic people in photographs of 640 x 480 (JPEG, quality 90) to a temporary folder, and trains a
network on it with the published augmentation, as `fastmetro train --data.files` does. "busy" is the time that the same
steps take on batches that are on the device already, as a share of the time that they take with the data. "images/s
alone" is what the workers deliver when nobody trains.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import common
from fastmetro.data.ground_truth import ground_truth
from fastmetro.data.synthetic.dataset import SyntheticPeople
from fastmetro.data.synthetic.photographs import load_tiles
from fastmetro.data.tsv import TsvSource
from fastmetro.data.tsv.build import build_data
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.distributed import World
from fastmetro.meshes.mesh import load_mesh
from fastmetro.models import create_model
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import make_optimizer
from fastmetro.training.sources import Batches, TsvBatches, make_sampler
from fastmetro.training.step import CapturedStep, TrainingStep

SIZE = (640, 480)
_READ_AHEAD = 2
"""Batches per worker; what a DataLoader does by default."""
COLUMNS = ("model", "batch", "pixels", "workers", "steps", "step_ms", "step_without_data_ms", "busy",
           "images_per_second", "images_per_second_alone")  # fmt: skip


def write_photographs(folder: Path, count: int, device: torch.device) -> Path:
    """The YAML file of a data set with so many rows; people anywhere in photographs of ``SIZE``.

    The photographs are those that scikit-image installs: a plain page would be decoded in half of the time.
    """
    people = SyntheticPeople(load_mesh("anny-body"), 5, 384).to(device)
    width, height = SIZE
    pages = [Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((width, width)) for tile in load_tiles()]
    names, centres = [], []
    generator = np.random.default_rng(0)
    for first in range(0, count, 16):
        images = people(torch.arange(first, min(first + 16, count), device=device)).images.permute(0, 2, 3, 1).cpu()
        for number, image in enumerate(images.numpy(), start=first):
            page = pages[number % len(pages)].crop((0, 0, width, height))
            left, top = int(generator.integers(0, width - 384)), int(generator.integers(0, height - 384))
            page.paste(Image.fromarray(image), (left, top))
            file = io.BytesIO()
            page.save(file, "JPEG", quality=90)
            names.append(f"{number}.jpg")
            (folder / names[-1]).write_bytes(file.getvalue())
            centres.append([left + 192, top + 192])
    joints = np.concatenate([generator.uniform(0, 400, (count, 24, 2)), np.ones((count, 24, 1))], -1)
    points = np.concatenate([generator.normal(size=(count, 24, 3)), np.ones((count, 24, 1))], -1)
    np.savez(
        folder / "annotations.npz", imgname=np.array(names), center=np.array(centres, float),
        scale=np.full(count, 384 / 200), part=joints, S=points,
    )  # fmt: skip
    return build_data(folder / "annotations.npz", folder, folder / "people", "body").path


def make_source(path: Path, options: argparse.Namespace, pixels: Any, workers: int, device: torch.device) -> Batches:
    """Batches as a training gets them."""
    sets = [TsvDataset(TsvSource(path), "body", seed=1, pixels=pixels, compat="published")]
    sampler = make_sampler(sets, (), 0.0, batch_size=options.batch, seed=1, world=World())
    truth = ground_truth(load_mesh("anny-body"), None).to(device)
    return TsvBatches(sets, truth, sampler, device, workers)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Any, steps: int, device: torch.device, skip: int = 2) -> float:
    """Of each of so many calls, after ``skip`` that do not count."""
    for step in range(skip):
        call(step)
    _synchronize(device)
    start = time.perf_counter()
    for step in range(skip, steps + skip):
        call(step)
    _synchronize(device)
    return (time.perf_counter() - start) / steps


def _skipped(workers: int) -> int:
    """Batches that workers have read ahead when the first one comes, twice: they would be counted as fast ones."""
    return 2 + 2 * _READ_AHEAD * workers


def measure(path: Path, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row per place of the pixels and number of workers."""
    torch.backends.cudnn.benchmark = device.type == "cuda"
    model = create_model(options.model, options.backbone).to(device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    on_gpu = device.type == "cuda"
    optimizer = make_optimizer(model, 1e-4, 1e-4, capturable=on_gpu)
    objective = Objective(MeshRecoveryLoss(model.mesh)).to(device)
    network = torch.compile(model) if on_gpu else model
    step: Any = TrainingStep(model, network, objective, optimizer, clip=0.3, precision="bf16")
    batch = make_source(path, options, "worker", 0, device)(0)
    if on_gpu:
        step = CapturedStep(step, batch.images, batch.labels)
    alone = _seconds(lambda _: step(batch.images, batch.labels), options.steps, device)
    rows = []
    for pixels in options.pixels:
        for workers in options.workers:
            source = make_source(path, options, pixels, workers, device)
            reading = _seconds(source, options.steps, device, _skipped(workers))
            source = make_source(path, options, pixels, workers, device)

            def train(number: int, source: Batches = source) -> None:
                found = source(number)
                step(found.images, found.labels)

            whole = _seconds(train, options.steps, device, _skipped(workers))
            row = dict(zip(COLUMNS, (
                options.model, options.batch, pixels, workers, options.steps, f"{1e3 * whole:.4g}",
                f"{1e3 * alone:.4g}", f"{alone / whole:.3f}", f"{options.batch / whole:.4g}",
                f"{options.batch / reading:.4g}",
            ), strict=True))  # fmt: skip
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        "python -m bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2, 4, 8, 16])
    parser.add_argument("--pixels", nargs="+", choices=("worker", "device"), default=["worker", "device"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--model", default="fastmetro-s")
    parser.add_argument("--backbone", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(write_photographs(Path(folder), options.rows, device), options, device)
    common.write_csv(options.csv or common.results_csv("data", device), rows)
