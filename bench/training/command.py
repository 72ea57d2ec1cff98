"""Training steps on random tensors on the device: time, peak memory, and the targets.

    python -m bench training [--cases s-r50 l-r50 l-r50-full] [--contenders ours compiled ...] [--seconds 3]
                             [--rounds 5] [--batch 32] [--device cuda] [--csv FILE] [--profile FILE]

A time is that of one synchronised step; contenders take turns. Before they do, the first loss of each and the norm of
its gradient, eager and without dropout, are held against those of the first contender, and so is its loss after the
first steps as it is timed, which dropout blurs. "x ours" is how many times longer a step takes than that of the fastest
contender of ours that ran; the report names it. Rows go to bench/results/training_<device>.csv, and replace those of
the same case. `--profile FILE` writes the kernels of a step of every contender and their time, also by what they do, as
JSON as soon as a contender is ready: how long the device is busy, without what is between kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import common
from bench.training import profile
from bench.training.cases import CASES, Case, build_model, random_batch
from bench.training.contenders import NAMES, OURS, Contender, build
from fastmetro.files import replacing
from fastmetro.models import FastMETRO
from fastmetro.profiling.latency import alternate, median_ratio, tensor_float_32
from fastmetro.profiling.record import read_rows

TARGETS = {
    (case, name): least for case in ("s-r50", "l-r50") for name, least in (("published", 6.0), ("compiled", 1.5))
}
"""How many times faster our step must be, on one H200, batch 32."""
AGREE = 0.02
"""Relative difference of the first loss that bfloat16 may make."""
GRADIENT = 0.05
"""The same of the norm of the first gradient."""
NEAR = 0.15
"""The same of the loss after the first steps, to which dropout adds."""
WARM_UPS = 3
FIRST_SECONDS = 0.3
"""Of steps that are timed as soon as a contender is ready: a run that is cut short tells something, too."""
MIB = 2**20


@contextlib.contextmanager
def _without_dropout(model: FastMETRO) -> Iterator[None]:
    """In the layers, which copies of the model take over, and in the settings, of which the baselines are made."""
    layers = [layer for layer in model.modules() if hasattr(layer, "dropout") and isinstance(layer.dropout, float)]
    before, config = [layer.dropout for layer in layers], model.config
    for layer in layers:
        layer.dropout = 0.0  # type: ignore[assignment]
    model.config = replace(config, dropout=0.0)
    try:
        yield
    finally:
        model.config = config
        for layer, value in zip(layers, before, strict=True):
            layer.dropout = value


def first_values(name: str, model: FastMETRO, images: Tensor, labels: Any) -> tuple[float, float]:
    """The loss of the first step and the norm of its gradient, eager and without dropout."""
    with _without_dropout(model):
        contender = build(name, model, images, labels, eager=True)
        with tensor_float_32(contender.tf32):
            loss, norm, *_ = contender.run().tolist()
            return loss, norm


class Prepared(NamedTuple):
    """A contender that is warm, the seconds that it took, the most memory of its steps in MiB, and its loss then."""

    contender: Contender
    seconds: float
    peak: float
    loss: float


def prepare(model: FastMETRO, images: Tensor, labels: Any, name: str) -> Prepared:
    """Build a contender and make its first steps."""
    device = images.device
    start, before = time.perf_counter(), 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    contender = build(name, model, images, labels)
    with tensor_float_32(contender.tf32):
        losses = [float(contender.run()[0]) for _ in range(WARM_UPS)]
    peak = (torch.cuda.max_memory_allocated(device) - before) / MIB if device.type == "cuda" else float("nan")
    return Prepared(contender, time.perf_counter() - start, peak, losses[-1])


def _check(losses: Sequence[float], tolerance: float, what: str, names: Sequence[str]) -> None:
    """The last loss against the first one."""
    if not abs(losses[-1] - losses[0]) <= tolerance * losses[0]:
        raise ValueError(f"its {what} is {losses[-1]:.5g}, that of {names[0]} is {losses[0]:.5g}")


def run_case(case: Case, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a case, ours last."""
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    model = build_model(case, device)
    images, labels = random_batch(model.mesh, case.batch, device)
    rows: list[dict[str, Any]] = []
    warm: list[tuple[dict[str, Any], Contender]] = []
    losses: list[float] = []
    norms: list[float] = []
    later: list[float] = []
    for name in names:
        row: dict[str, Any] = {"case": case.name, "batch": case.batch, "contender": name, "status": "ok", "reason": ""}
        rows.append(row)
        try:
            loss, norm = first_values(name, model, images, labels)
            losses.append(loss)
            norms.append(norm)
            _check(losses, AGREE, "first loss", names)
            _check(norms, GRADIENT, "first gradient's norm", names)
            ready = prepare(model, images, labels, name)
            later.append(ready.loss)
            _check(later, NEAR, "loss after the first steps", names)
        except (RuntimeError, ValueError) as error:
            row.update(status="failed", reason=" ".join(str(error).split())[:200])
            print(f"  {name}: {row['reason']}", flush=True)
            continue
        row.update(build_s=f"{ready.seconds:.1f}", peak_mib=f"{ready.peak:.0f}")
        first = alternate([_call(ready.contender)], device, FIRST_SECONDS, 1)[0]
        took = f"{statistics.median(value for part in first for value in part):.4g} ms a step"
        print(f"  {name}: ready after {ready.seconds:.1f} s, at most {ready.peak:.0f} MiB, {took}", flush=True)
        warm.append((row, ready.contender))
        if options.profile is not None:
            _profile(options.profile, f"{case.name}, {name}", ready.contender, device)
    calls = [_call(contender) for _, contender in warm]
    samples = alternate(calls, device, options.seconds, options.rounds)
    ours = _fastest_of_ours([(row["contender"], sample) for (row, _), sample in zip(warm, samples, strict=True)])
    for (row, _), sample in zip(warm, samples, strict=True):
        times = [value for part in sample for value in part]
        row.update(
            step_ms=f"{statistics.median(times):.4g}", fastest_ms=f"{min(times):.4g}", steps=len(times),
            images_per_second=f"{1e3 * case.batch / statistics.median(times):.5g}",
            times_ours=f"{median_ratio(sample, ours):.4g}" if ours else "",
        )  # fmt: skip
    return [{**{name: row.get(name, "") for name in COLUMNS}, **_where(device)} for row in rows]


def _fastest_of_ours(samples: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> Sequence[Sequence[float]] | None:
    """The times of that contender of ours which is the fastest, by its median."""
    own = [sample for name, sample in samples if name.split(",")[0] == OURS]
    return min(own, key=lambda parts: statistics.median(value for part in parts for value in part), default=None)


def _profile(path: Path, name: str, contender: Contender, device: torch.device) -> None:
    """Adds a contender to the file."""
    found = profile.summary(profile.spent(_call(contender), device))
    times = f"{found['total_us']:.0f} us in kernels, {found['waited_us']:.0f} between them"
    print(f"  {name}: {times}: {found['by_kind_us']}", flush=True)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    kept[name] = _where(device) | found
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(kept, indent=1) + "\n")


COLUMNS = ("case", "batch", "contender", "status", "reason", "step_ms", "fastest_ms", "steps", "images_per_second",
           "times_ours", "peak_mib", "build_s")  # fmt: skip


def _where(device: torch.device) -> dict[str, str]:
    return {**common.environment(device), **common.versions()}


def _call(contender: Contender) -> Any:
    def call() -> None:
        with tensor_float_32(contender.tf32):
            contender.run()

    return call


def report(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, and the targets."""
    lines = [f"{'case':<12} {'contender':<24} {'ms':>9} {'x ours':>8} {'MiB':>8}"]
    for row in rows:
        values = f"{row['step_ms']:>9} {row['times_ours']:>8} {row['peak_mib']:>8}"
        lines.append(f"{row['case']:<12} {row['contender']:<24} {values} {row['reason']}")
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case and row["contender"].split(",")[0] == OURS]
        best = min((row for row in own if row["step_ms"]), key=lambda row: float(row["step_ms"]), default=None)
        if best is not None:
            lines.append(f"  {case}: the fastest of ours is {best['contender']!r}")
    for (case, name), least in TARGETS.items():
        found = [row for row in rows if (row["case"], row["contender"]) == (case, name) and row["times_ours"]]
        if found:
            ratio = float(found[0]["times_ours"])
            verdict = "reached" if ratio >= least else "MISSED"
            lines.append(f"  {case} against {name}: at least {least:g}x, {ratio:.3g}, {verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases."""
    parser = argparse.ArgumentParser(
        "python -m bench training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed steps per contender")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="another number of images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="also where the time of a step goes, as JSON")
    options = parser.parse_args(arguments)
    path = options.csv or common.results_csv("training", torch.device(options.device))
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        case = replace(CASES[name], batch=options.batch or CASES[name].batch)
        print(f"{name}, batch {case.batch}:", flush=True)
        rows += run_case(case, options.contenders, options)
        again = {(row["case"], row["batch"]) for row in rows}
        earlier = read_rows(path, COLUMNS) if path.is_file() else []
        kept = [row for row in earlier if (row["case"], int(row["batch"])) not in again]
        common.write_csv(path, [*kept, *rows])
    print(report(rows))
