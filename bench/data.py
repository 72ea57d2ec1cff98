"""Training from TSV files on disk: is the GPU busy, and what does a worker manage?

    python -m bench data [--workers 0 2 4 8 16] [--pixels worker device] [--batch 32] [--steps 200] [--rows 512]
                         [--model fastmetro-s] [--backbone resnet50] [--device cuda] [--csv FILE]

Writes a data set of synthetic people in photographs of 640 x 480 (JPEG, quality 90) to a temporary folder, and trains a
network on it with the published augmentation, as `fastmetro train --data.files ... --fused --compile-model
--capture-step` does. "busy" is the time that the same steps take on batches that are on the device already, as a share
of the time that they take with the data; "kernels_busy" the share of the time in which a kernel ran, by the profiler,
copies left out. "waiting_ms" of a step this process waits for the workers, "host_ms" it needs for all else it does: to
send a batch, make its crops and labels, and launch the step. "images_per_second_alone" is what the workers deliver when
nobody trains.
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import common
from bench.training.profile import Run, own_times
from fastmetro.data.ground_truth import ground_truth
from fastmetro.data.synthetic.dataset import SyntheticPeople
from fastmetro.data.synthetic.photographs import load_tiles
from fastmetro.data.tsv import TsvSource
from fastmetro.data.tsv.build import build_data
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.data.tsv.slots import READ_AHEAD
from fastmetro.distributed import World
from fastmetro.meshes.mesh import load_mesh
from fastmetro.models import create_model
from fastmetro.training.fused import fuse_backbone, fuse_transformer
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import make_optimizer
from fastmetro.training.sources import Batch, TsvBatches, make_sampler
from fastmetro.training.step import CapturedStep, TrainingStep

SIZE = (640, 480)
COLUMNS = ("model", "batch", "pixels", "workers", "steps", "step_ms", "step_without_data_ms", "busy", "kernels_busy",
           "waiting_ms", "host_ms", "images_per_second", "images_per_second_alone")  # fmt: skip


class TimedBatches(TsvBatches):
    """Batches as a training gets them.

    Attributes:
        waited: seconds that this process has waited for the workers.
    """

    waited = 0.0

    def _read(self, step: int) -> Any:
        start = time.perf_counter()
        batch = super()._read(step)
        self.waited += time.perf_counter() - start
        return batch


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


def make_source(
    path: Path, options: argparse.Namespace, pixels: Any, workers: int, device: torch.device
) -> TimedBatches:
    """A source of its own workers."""
    sets = [TsvDataset(TsvSource(path), "body", seed=1, pixels=pixels, compat="published")]
    sampler = make_sampler(sets, (), 0.0, batch_size=options.batch, seed=1, world=World())
    truth = ground_truth(load_mesh("anny-body"), None).to(device)
    return TimedBatches(sets, truth, sampler, device, workers)


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
    return 2 + 2 * READ_AHEAD * workers


def make_step(path: Path, options: argparse.Namespace, device: torch.device) -> tuple[Any, Batch]:
    """The fastest step that there is on the device, and a batch for it."""
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu
    model = create_model(options.model, options.backbone).to(device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if on_gpu:
        fuse_backbone(model, "bf16")
        fuse_transformer(model, "bf16")
    optimizer = make_optimizer(model, 1e-4, 1e-4, capturable=on_gpu, fused="project" if on_gpu else "torch")
    objective: Any = Objective(MeshRecoveryLoss(model.mesh)).to(device)
    network: Any = model
    if on_gpu:
        network, objective = torch.compile(model), torch.compile(objective)
    step = TrainingStep(model, network, objective, optimizer, clip=0.3, precision="bf16")
    batch = make_source(path, options, "worker", 0, device)(0)
    return (CapturedStep(step, batch.images, batch.labels) if on_gpu else step), batch


def kernels_busy(call: Callable[[int], object], first: int, steps: int, device: torch.device) -> float:
    """The share of the time of so many steps, of which the first is given, in which a kernel ran; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for step in range(first, first + steps):
            call(step)
        torch.cuda.synchronize()
    runs = [
        Run(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    whole = max(run.end for run in runs) - min(run.start for run in runs)
    kernels = [run for run in runs if not run.name.startswith("Mem")]
    return sum(found.microseconds for found in own_times(kernels).values()) / whole


def measure_case(
    path: Path, options: argparse.Namespace, step: Any, pixels: str, workers: int, device: torch.device
) -> dict[str, float]:
    """What is found for a place of the pixels and a number of workers."""
    skip, steps = _skipped(workers), options.steps
    reading = _seconds(make_source(path, options, pixels, workers, device), steps, device, skip)
    source = make_source(path, options, pixels, workers, device)
    host = waited = 0.0

    def train(number: int) -> None:
        nonlocal host, waited
        start, before = time.perf_counter(), source.waited
        found = source(number)
        step(found.images, found.labels)
        if number >= skip:
            waited += source.waited - before
            host += time.perf_counter() - start - (source.waited - before)

    whole = _seconds(train, steps, device, skip)
    found = {"step_ms": 1e3 * whole, "waiting_ms": 1e3 * waited / steps, "host_ms": 1e3 * host / steps}
    busy = kernels_busy(train, steps + skip, max(steps // 4, 1), device)
    speeds = {"images_per_second": options.batch / whole, "images_per_second_alone": options.batch / reading}
    return {**found, "kernels_busy": busy, **speeds}


def measure(path: Path, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per place of the pixels and number of workers."""
    step, batch = make_step(path, options, device)
    alone = 1e3 * _seconds(lambda _: step(batch.images, batch.labels), options.steps, device)
    for pixels in options.pixels:
        for workers in options.workers:
            found = measure_case(path, options, step, pixels, workers, device)
            found |= {"step_without_data_ms": alone, "busy": alone / found["step_ms"]}
            row = {
                "model": options.model, "batch": options.batch, "pixels": pixels, "workers": workers,
                "steps": options.steps, **{name: f"{value:.4g}" for name, value in found.items()},
            }  # fmt: skip
            row = {name: row[name] for name in COLUMNS}
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            yield {**row, **common.environment(device), **common.versions()}


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
        rows = list(measure(write_photographs(Path(folder), options.rows, device), options, device))
    common.write_csv(options.csv or common.results_csv("data", device), rows)
