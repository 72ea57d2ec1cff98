"""The inference engine against the published network and the strongest plain PyTorch: the cases that must be shown.

    python -m bench fps [--device cuda] [--cases s-r50-1 l-h64-1] [--seconds 2] [--rounds 10] [--library]
                        [--csv FILE]

`fastmetro bench fps` measures one network; this runs it on the networks and batch sizes of the targets, collects the
rows in bench/results/fps_<device>.csv after each case, and prints the targets with what was reached. Rows of cases that
are not measured again stay in the file, each with its commit and date. With `--report CSV` nothing is measured.

Where time on a device is short: name the cases, those of one network in one call, which builds it once. Most of what is
left is compiling the tuned baseline and the engine's Triton kernels. The folders that the environment variables
TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR name keep what was compiled; keep them, one pair for each kind of device.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import common
from fastmetro.profiling.fps import COLUMNS, NETWORK, Built, all_right, build_network, run_fps
from fastmetro.profiling.parts import WHOLE
from fastmetro.profiling.record import Row, environment, read_rows, write_rows
from fastmetro.profiling.settings import BaselineName, FpsSettings

MODELS = {"s": "fastmetro-s", "l": "fastmetro-l"}
BACKBONES = {"r50": "resnet50", "h64": "hrnet-w64"}


@dataclass(frozen=True)
class Target:
    """A ratio of wall times within one run that must be reached, e.g. of case "s-r50-1" against "tuned".

    `limit_ms` instead bounds the engine's time after the backbone, from its parts.
    """

    case: str
    contender: str
    least: float = 0.0
    limit_ms: float = 0.0


_RATIOS = {  # against published and against tuned
    "s-r50-1": (15, 1.85),
    "s-r50-32": (10, 1.8),
    "s-r50-256": (11, 1.8),
    "l-r50-1": (20, 2.1),
    "l-r50-256": (10, 1.9),
    "l-h64-1": (14, 1.8),
}
GPU_TARGETS = (
    *(Target(case, "published", ratio) for case, (ratio, _) in _RATIOS.items()),
    *(Target(case, "tuned", ratio) for case, (_, ratio) in _RATIOS.items()),
    Target("s-r50-1", "engine", limit_ms=0.12),
    Target("l-r50-1", "engine", limit_ms=0.28),
)
"""On one H200 in float16, input on the device, synchronised calls."""
CPU_TARGETS = (Target("s-r50-1", "plain", 1.5),)
"""On two cores, float32, against the plain path in eager mode."""


def case_of(row: Row) -> str:
    """ "s-r50-32" of a row; other networks get a name that no target has."""
    models, backbones = ({long: short for short, long in names.items()} for names in (MODELS, BACKBONES))
    model, backbone = models.get(row["model"], row["model"]), backbones.get(row["backbone"], row["backbone"])
    return f"{model}-{backbone}-{row['batch']}"


def settings_of(case: str, options: argparse.Namespace, image: Path | None) -> FpsSettings:
    """What to run for a case."""
    model, backbone, batch = case.split("-")
    cpu = torch.device(options.device).type == "cpu"
    baseline: tuple[BaselineName, ...] = ("published", "tuned", "plain") if cpu else ("published", "tuned")
    return FpsSettings(
        model=MODELS[model],
        backbone=BACKBONES[backbone],
        batch=(int(batch),),
        baseline=(*baseline, "library") if options.library else baseline,
        device=options.device,
        seconds=options.seconds,
        rounds=options.rounds,
        image=image,
    )


def after_backbone_ms(row: Row) -> float | None:
    """Milliseconds of an engine behind the backbone; None where it did not tell."""
    parts = dict(part.rsplit(" ", 1) for part in row["parts_ms"].split("; ")) if row["parts_ms"] else {}
    return next((float(value) for name, value in parts.items() if name.startswith(WHOLE)), None)


def measured(target: Target, rows: Sequence[Row]) -> float | None:
    """What a target is held against: a ratio or milliseconds; None where it was not measured or was wrong."""
    for row in rows:
        if (case_of(row), row["contender"], row["scope"], row["status"]) == (
            target.case, target.contender, NETWORK, "ok",
        ):  # fmt: skip
            if target.limit_ms:
                return after_backbone_ms(row)
            return float(row["times_engine"]) if row["times_engine"] else None
    return None


def target_table(rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """Targets, what was measured, and whether that is enough."""
    lines = ["Must show: times faster than the baseline, or milliseconds after the backbone"]
    met = missed = 0
    for target in targets:
        value = measured(target, rows)
        asked = f"at most {target.limit_ms:g} ms" if target.limit_ms else f"at least {target.least:g}x"
        reached = value is not None and (value <= target.limit_ms if target.limit_ms else value >= target.least)
        met, missed = met + reached, missed + (value is not None and not reached)
        verdict = "not measured" if value is None else f"{value:.3g}, {'reached' if reached else 'MISSED'}"
        lines.append(f"  {target.case:<10} {target.contender:<10} {asked:<16} {verdict}")
    return "\n".join([*lines, f"  {met} of {len(targets)} reached, {missed} missed"])


def earlier_rows(path: Path, device: torch.device) -> list[Row]:
    """Rows of the file that is to be written, if there is one.

    Raises:
        ValueError: its columns are others than those of new rows.
    """
    if not path.is_file():
        return []
    rows = read_rows(path, COLUMNS)
    if rows and list(rows[0]) != [*COLUMNS, *environment(device, "")]:
        raise ValueError(f"{path} has other columns than new rows: move it away, or name another file with --csv")
    return rows


def photograph(folder: Path) -> Path | None:
    """A JPEG of NASA's portrait of Eileen Collins (public domain); None where scikit-image is missing."""
    try:
        import skimage.data
    except ImportError:
        print("scikit-image is not installed: nothing is timed from file to file")
        return None
    from PIL import Image

    path = folder / "astronaut.jpg"
    Image.fromarray(skimage.data.astronaut()).save(path, quality=90)
    return path


def measure(cases: Sequence[str], options: argparse.Namespace, path: Path) -> list[Row]:
    """Rows of the cases, which are in the file after each case. Cases of one network share it."""
    earlier = earlier_rows(path, torch.device(options.device))
    say = functools.partial(print, flush=True)  # a call that is cut off has told what it did
    networks: dict[str, Built] = {}
    new: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            image = photograph(Path(folder)) if case.endswith("-1") else None
            settings = settings_of(case, options, image)
            network, start = case.rpartition("-")[0], time.monotonic()
            if network not in networks:
                networks[network] = build_network(settings)
                say(f"{network}: network made in {time.monotonic() - start:.1f} s")
            command = f"python -m bench fps --cases {case}"
            new += run_fps(settings, say, command, networks[network])
            again = set(map(case_of, new))
            write_rows(path, [row for row in earlier if case_of(row) not in again] + new)
            say(f"{case}: {time.monotonic() - start:.1f} s in all")
    return new


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases and compare them with the targets."""
    parser = argparse.ArgumentParser(
        "python -m bench fps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=list(_RATIOS), help="default: all; on a CPU s-r50-1")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed calls per contender and case")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--library", action="store_true", help="also the engine with the library's convolutions alone")
    parser.add_argument("--csv", type=Path, help="default: bench/results/fps_<device>.csv")
    parser.add_argument("--report", type=Path, metavar="CSV", help="measure nothing, compare the rows of that file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    targets = CPU_TARGETS if device.type == "cpu" else GPU_TARGETS
    if options.report:
        print(target_table(read_rows(options.report, COLUMNS), targets))
        return
    path = options.csv or common.results_csv("fps", device)
    cases = list(dict.fromkeys(options.cases or [target.case for target in targets]))
    new = measure(cases, options, path)
    print(target_table(new, targets))
    if not all_right(new):
        raise SystemExit("a contender was wrong or failed: see its row")
