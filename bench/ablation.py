"""Networks without one of their parts, trained on synthetic people for equally many steps (paper, Table 4).

    python -m bench ablation [--variants full no-mask learned-upsampling] [--seeds 0 1 2] [--steps 4000 | --seconds 500]
                             [--batch 32] [--model fastmetro-s] [--backbone resnet50] [--jobs 1] [--eager]
                             [--device cuda] [--csv FILE] [--curves FILE] [--output out/ablation]

Every variant is trained once per seed (of weights and images), and its averaged weights are measured on the same
held-out images. With --seconds a short trial says how many steps fit. --jobs runs go on at once, over all GPUs that
there are. Rows go to bench/results/ablation_<device>.csv and replace those of the same variant and seed; --curves keeps
the logs, for `python -m bench curves FILE`.
"""

from __future__ import annotations

import argparse
import functools
import queue
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import common, runs
from bench.curves import write_curves
from fastmetro.models import create_model
from fastmetro.profiling.record import read_rows

VARIANTS: dict[str, dict[str, str]] = {
    "full": {},
    "no-mask": {"masking": "none"},
    "half-heads": {"masking": "half-heads"},
    "learned-upsampling": {"upsampling": "learned"},
    "neither": {"masking": "none", "upsampling": "learned"},
}
"""What differs from the full network, which has the mask in all heads and fixed upsampling."""
DEFAULT = ("full", "no-mask", "learned-upsampling")
ERRORS = ("mpjpe", "pa_mpjpe", "mpvpe")
COLUMNS = ("variant", "seed", "status", "reason", "model", "backbone", "parameters", "batch", "steps", *ERRORS,
           "images_per_second", "seconds")  # fmt: skip
_PLANNED = 0.92
"""Share of --seconds that is planned with: runs that start together do not end together."""
Pair = tuple[str, int]
"""Variant and seed."""


def training(options: argparse.Namespace, variant: str, seed: int, steps: int, gpu: int | None) -> runs.Run:
    """The run of a variant."""
    settings: dict[str, object] = {
        "model": options.model, "backbone": options.backbone, "batch-size": options.batch, "steps": steps,
        "seed": seed, "learning-rate": options.learning_rate, "image-size": options.image_size,
        "eval-count": options.eval_count, "log-every": max(steps // 100, 10), "save-every": steps,
        "device": options.device, "commit": common.commit(), **VARIANTS[variant],
    }  # fmt: skip
    if options.device == "cuda":
        settings |= {"capture-images": True} | ({} if options.eager else {"capture-step": True, "fused": True})
    return runs.Run(options.output / f"{variant}-{seed}", runs.arguments(settings), gpu=gpu)


def execute_all(options: argparse.Namespace, wanted: Sequence[Pair], steps: int) -> Iterator[dict[str, Any]]:
    """Train; the row of each run, in order."""
    slots: queue.Queue[int | None] = queue.Queue()
    for slot in range(options.jobs):
        slots.put(slot % torch.cuda.device_count() if options.device == "cuda" else None)

    def one(pair: Pair) -> dict[str, Any]:
        gpu = slots.get()
        try:
            return _row(options, training(options, *pair, steps, gpu), *pair, steps)
        finally:
            slots.put(gpu)

    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(one, wanted)


def _row(options: argparse.Namespace, run: runs.Run, variant: str, seed: int, steps: int) -> dict[str, Any]:
    start = time.monotonic()
    reason = runs.execute(run)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
        "variant": variant, "seed": seed, "status": "failed" if reason else "ok", "reason": reason,
        "model": options.model, "backbone": options.backbone, "batch": options.batch, "steps": steps,
        "parameters": _parameters(options.model, options.backbone, variant),
        "seconds": f"{time.monotonic() - start:.0f}",
    }  # fmt: skip
    if not reason:
        found = runs.report(run.folder)
        row |= {name: f"{found[name]:.2f}" for name in ERRORS}
        row["images_per_second"] = f"{runs.images_per_second(run.folder):.5g}"
    return {**row, **common.environment(torch.device(options.device)), **common.versions()}


@functools.cache
def _parameters(model: str, backbone: str, variant: str) -> int:
    changed: dict[str, Any] = dict(VARIANTS[variant])
    return sum(parameter.numel() for parameter in create_model(model, backbone, **changed).parameters())


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Into the table, in the place of those of the same variant and seed."""
    again = {(row["variant"], str(row["seed"])) for row in rows}
    earlier = read_rows(path, COLUMNS) if path.is_file() else []
    common.write_csv(path, [*(row for row in earlier if (row["variant"], row["seed"]) not in again), *rows])


def steps_that_fit(options: argparse.Namespace, wanted: Sequence[Pair]) -> int:
    """How many steps each run may have so that all are done after ``options.seconds``, by a trial of a few.

    Raises:
        ValueError: the trial failed, or the time is too short.
    """
    start, trial = time.monotonic(), wanted[: options.jobs]
    step = 0.0
    for row in execute_all(options, trial, options.trial):
        if row["status"] != "ok":
            raise ValueError(f"the trial of {row['variant']} failed: {row['reason']}")
        step = max(step, options.batch / float(row["images_per_second"]))
    gone = time.monotonic() - start
    around = max(gone - options.trial * step, 0.0)  # starting, capturing, measuring
    fit = int((_PLANNED * (options.seconds - gone) * len(trial) / len(wanted) - around) / step)
    print(
        f"{len(trial)} runs at once: {1e3 * step:.1f} ms a step, {around:.0f} s around the steps; {fit} steps each fit",
        flush=True,
    )
    if fit < options.trial:
        raise ValueError(
            f"--seconds {options.seconds:g} is too little for {len(wanted)} runs; name fewer, or give more"
        )
    return fit


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and spread over the seeds, and how far each variant is from the full network with the same seed."""
    done = [row for row in rows if row["status"] == "ok"]
    found = {(row["variant"], str(row["seed"])): {name: float(row[name]) for name in ERRORS} for row in done}
    lines = [f"{'variant':<20} {'seeds':>5}" + "".join(f"{name:>18}" for name in ERRORS) + "   minus full"]
    for variant in dict.fromkeys(row["variant"] for row in done):
        errors = {seed: values for (name, seed), values in found.items() if name == variant}
        columns = [_spread([values[name] for values in errors.values()]) for name in ERRORS]
        pairs = [(values, found["full", seed]) for seed, values in errors.items() if ("full", seed) in found]
        apart = [", ".join(f"{a[name] - b[name]:+.1f}" for a, b in pairs) for name in ERRORS]
        behind = "" if variant == "full" else "   " + "; ".join(f"{n} {v}" for n, v in zip(ERRORS, apart, strict=True))
        lines.append(f"{variant:<20} {len(errors):>5}" + "".join(f"{column:>18}" for column in columns) + behind)
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _keep_curves(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    logs = [(row["variant"], runs.log_rows(options.output / f"{row['variant']}-{row['seed']}")) for row in rows]
    write_curves(options.curves, [(name, log) for name, log in logs if log])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write the table."""
    parser = argparse.ArgumentParser(
        "python -m bench ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4000, help="of each run")
    length.add_argument("--seconds", type=float, help="of all runs together, instead of --steps")
    parser.add_argument("--trial", type=int, default=120, help="steps of the trial that --seconds makes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--model", default="fastmetro-s")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--eval-count", type=int, default=1000, help="held-out images")
    parser.add_argument("--eager", action="store_true", help="neither captured steps nor --fused")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--curves", type=Path, help="the logs of all runs")
    parser.add_argument("--output", type=Path, default=common.ROOT / "out" / "ablation")
    options = parser.parse_args(arguments)
    options.csv = options.csv or common.results_csv("ablation", torch.device(options.device))
    # By seeds: whenever it is stopped, the variants have as many.
    wanted = [(variant, seed) for seed, variant in product(options.seeds, options.variants)]
    try:
        steps = options.steps if options.seconds is None else steps_that_fit(options, wanted)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    rows: list[dict[str, Any]] = []
    for row in execute_all(options, wanted, steps):
        rows.append(row)
        write_rows(options.csv, rows)
        errors = ", ".join(f"{name} {row[name]} mm" for name in ERRORS)
        print(f"{row['variant']}, seed {row['seed']}, {steps} steps: {row['reason'] or errors}", flush=True)
        if options.curves:
            _keep_curves(options, rows)
    print(report(rows))
