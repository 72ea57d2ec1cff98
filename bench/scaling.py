"""Several GPUs of one host against one: the same curve, and how many times the images per second.

    python -m bench scaling [--processes 2] [--batch 64] [--steps 200] [--model fastmetro-s] [--backbone resnet50]
                            [--parts curve speed] [--eager] [--tolerance 0.02] [--seconds 150] [--device cuda]
                            [--csv FILE] [--curves FILE] [--output out/scaling]

"curve": one process, the same again, and several under torchrun train with the same images, --batch of them in each
step, in float32, without dropout, whose random numbers each process has for itself; on GPUs batch norms take the
moments of the whole batch (on CPUs they cannot, and the curves differ).
Compared are the losses of the log, means over a twentieth of the run: the largest relative difference to the first run
must not exceed the tolerance. How far the repeated run is from it tells what the order of additions does alone: at high
rates the loss goes through jumps that double every difference, and one process does not repeat its own curve.

"speed": in bfloat16, on GPUs with --fused --compile-model and captured images and steps: images per second of one
process and of several, with as many images for each process, with as many in all, and with batch norms over the whole
batch, which are PyTorch's. --seconds is the limit of each run; what fails has a row that says why. Rows go to
bench/results/scaling_<device>.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import common, runs
from bench.curves import write_curves

PARTS = ("curve", "speed")
COLUMNS = ("part", "run", "processes", "batch", "steps", "sync_batch_norm", "precision", "learning_rate", "status",
           "reason", "loss_difference", "tolerance", "images_per_second", "times_one")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        part: of the benchmark.
        name: unique among the cases of all parts.
        processes: of torchrun.
        batch: images per step, of all processes together.
        sync: batch norms over the whole batch.
        precision: for `fastmetro train`.
        captured: a step is one CUDA graph, collectives included.
    """

    part: str
    name: str
    processes: int
    batch: int
    sync: bool
    precision: str
    captured: bool


def cases(options: argparse.Namespace) -> list[Case]:
    """The runs, the one that others are held against first in each part."""
    count, batch, gpu = options.processes, options.batch, options.device == "cuda"
    graph = gpu and not options.eager
    found = [
        Case("curve", "one", 1, batch, False, "fp32", False),
        Case("curve", "one again", 1, batch, False, "fp32", False),
        Case("curve", f"{count} processes", count, batch, gpu, "fp32", False),
        Case("speed", "one, alone", 1, batch, False, "bf16", graph),
        Case("speed", f"{count}, same batch each", count, batch * count, False, "bf16", graph),
        Case("speed", f"{count}, same batch in all", count, batch, False, "bf16", graph),
    ]
    if gpu:  # nn.SyncBatchNorm is for GPUs
        found.append(
            Case("speed", f"{count}, same batch each, batch norms of all", count, batch * count, True, "bf16", graph)
        )
    return [case for case in found if case.part in options.parts]


def training(options: argparse.Namespace, case: Case) -> runs.Run:
    """The run of a case."""
    settings: dict[str, object] = {
        "model": options.model, "backbone": options.backbone, "batch-size": case.batch, "steps": options.steps,
        "precision": case.precision, "image-size": options.image_size, "learning-rate": options.learning_rate,
        "warmup": 0.5,  # a fast start multiplies differences of rounding
        "log-every": max(options.steps // 20, 1), "save-every": options.steps, "eval-count": 0,
        "device": options.device, "commit": common.commit(),
    }  # fmt: skip
    if case.part == "curve":
        settings["dropout"] = 0.0
    if case.sync:
        settings["sync-batch-norm"] = True
    if options.device == "cuda":
        settings["capture-images"] = True
    if options.device == "cuda" and case.part == "speed":
        settings |= {"fused": True, "compile-model": True}
    if case.captured:
        settings["capture-step"] = True
    folder = "".join(letter if letter.isalnum() else "-" for letter in f"{case.part} {case.name}")
    return runs.Run(options.output / folder, runs.arguments(settings), case.processes)


def loss_difference(first: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]) -> float:
    """The largest relative difference of the losses of two logs, row by row.

    Raises:
        ValueError: they are of different steps.
    """
    if not first or [row["step"] for row in first] != [row["step"] for row in other]:
        raise ValueError(f"the logs are of different steps: {len(first)} and {len(other)} rows")
    pairs = [(float(a["loss"]), float(b["loss"])) for a, b in zip(first, other, strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The row of each case."""
    device = torch.device(options.device)
    first: dict[str, Path] = {}
    for case in cases(options):
        run = training(options, case)
        first.setdefault(case.part, run.folder)
        reason = runs.execute(run, options.seconds)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
            "part": case.part, "run": case.name, "processes": case.processes, "batch": case.batch,
            "steps": options.steps, "sync_batch_norm": case.sync, "precision": case.precision,
            "learning_rate": options.learning_rate,
        }  # fmt: skip
        try:
            if not reason:
                row |= _result(options, case, run.folder, first[case.part])
        except (ValueError, OSError) as error:
            reason = str(error)
        row |= {"status": "failed" if reason else "ok", "reason": reason}
        yield {**row, **common.environment(device), **common.versions()}


def _result(options: argparse.Namespace, case: Case, folder: Path, first: Path) -> dict[str, str]:
    if case.part == "curve":
        difference = loss_difference(runs.log_rows(first), runs.log_rows(folder))
        return {"loss_difference": f"{difference:.3g}", "tolerance": f"{options.tolerance:g}"}
    speed = runs.images_per_second(folder)
    return {"images_per_second": f"{speed:.5g}", "times_one": f"{speed / runs.images_per_second(first):.3f}"}


def line(row: Mapping[str, Any]) -> str:
    """What a row says."""
    start = f"{row['part']}: {row['run']}, batch {row['batch']}: "
    if row["reason"]:
        return start + row["reason"]
    if row["part"] == "speed":
        return f"{start}{row['images_per_second']} images/s, {row['times_one']} times one"
    same = float(row["loss_difference"]) <= float(row["tolerance"])
    return f"{start}loss differs by at most {row['loss_difference']}, {'SAME' if same else 'DIFFERENT'} curve"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", default="fastmetro-s")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--eager", action="store_true", help="do not capture steps")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--curves", type=Path, help="the logs of the curves")
    parser.add_argument("--output", type=Path, default=common.ROOT / "out" / "scaling")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write the table."""
    options = _options(arguments)
    if options.processes < 2 or options.batch % options.processes:
        raise SystemExit(
            f"error: --processes must be at least 2 and divide --batch, got {options.processes} and {options.batch}"
        )
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    for row in measure(options):
        rows.append(row)
        common.write_csv(options.csv or common.results_csv("scaling", device), rows)
        print(line(row), flush=True)
    if options.curves:
        curves = [(case.name, runs.log_rows(training(options, case).folder)) for case in cases(options)
                  if case.part == "curve"]  # fmt: skip
        write_curves(options.curves, [(name, log) for name, log in curves if log])
