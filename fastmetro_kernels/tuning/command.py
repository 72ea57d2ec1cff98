"""Measures which backend and configuration is fastest on this GPU, and writes the table that `auto` goes by.

    python -m fastmetro_kernels.tune attention [--cases 431x64x32 ...] [--passes forward] [--dtype float16]
                                               [--seconds 300] [--out FILE]

Cases are VERTICESxDIMxBATCH, with 14 hubs and 8 heads, on a sphere whose lists are like those of the body meshes. Every
candidate is held against float64 first; a wrong one is refused. The right ones are timed in turn inside CUDA graphs,
on inputs that rotate beyond L2 (not at batch 1). The file is written after every case and pass, and keeps what it
held of other cases and devices. `auto` uses it where the environment variable FASTMETRO_KERNELS_TUNING names it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastmetro_kernels import backends
from fastmetro_kernels.attention.configs import PASSES
from fastmetro_kernels.tuning import compiling
from fastmetro_kernels.tuning.cases import Case, Shape
from fastmetro_kernels.tuning.choice import ENVIRONMENT, family_of
from fastmetro_kernels.tuning.measure import measure
from fastmetro_kernels.tuning.reader import TuningFileError
from fastmetro_kernels.tuning.table import Family, Point, merged, read_file, write_file

CASES = ("431x64x1", "431x64x32", "431x16x32", "1723x64x32", "6890x64x32", "6890x16x32")
DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_OUT = Path("attention_tuning.json")


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        "python -m fastmetro_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("op", choices=("attention",))
    made.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE", help=f"default: {' '.join(CASES)}")
    made.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    made.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float16"])
    made.add_argument("--seconds", type=float, default=0, help="begin no case and pass after so many; 0: no limit")
    made.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}; cases in it are kept")
    return made


def record(device: torch.device) -> dict[str, str]:
    """Where, with what and how a family was measured."""
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "commit": os.environ.get("FASTMETRO_COMMIT") or _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m fastmetro_kernels.tune", *sys.argv[1:]])[:1000],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Hash of the checkout this package lies in; of an installed package its version."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        done = None
    return done.stdout.strip() if done and not done.returncode else f"version {_version('fastmetro-kernels')}"


def existing(path: Path) -> dict[str, Family]:
    """What the file holds already; nothing where there is none.

    Raises:
        TuningFileError: it is no tuning file, which must not be overwritten.
    """
    return read_file(path) if path.exists() else {}


def run(options: argparse.Namespace, shapes: Sequence[Shape], device: torch.device, kept: Mapping[str, Family]) -> None:
    """Measures all cases and writes the file after each; says what it does."""
    start = time.monotonic()
    family = family_of(device)
    assert family is not None  # main() looked
    dtypes = [getattr(torch, name) for name in options.dtype]
    if not backends.triton_reasons(device):
        wanted = compiling.tasks(shapes, dtypes, options.passes, device)
        processes = compiling.compile_all(wanted)
        say(f"[{time.monotonic() - start:.0f} s] {len(wanted)} configurations compiled by {processes} processes")
    families, points = dict(kept), list[Point]()
    for shape in shapes:
        for dtype in dtypes:
            case: Case | None = None
            for pass_name in options.passes:
                if options.seconds and time.monotonic() - start > options.seconds:
                    say(f"not measured, time is up: {shape} {dtype} {pass_name}")
                    continue
                case = case or Case(shape, dtype, device)
                say(f"[{time.monotonic() - start:.0f} s] {shape} {dtype} {pass_name}")
                points.append(measure(case, pass_name, say))
                families = merged(families, family, record(device), points)
                write_file(options.out, families)
                for one in points[-1].candidates[:5]:
                    say(f"  {one.milliseconds:.4f} ms  {one}")
    say(f"[{time.monotonic() - start:.0f} s] {options.out}; to use it: {ENVIRONMENT}={options.out}")


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)


def main() -> None:
    """Checks the options, then measures."""
    options = (made := parser()).parse_args()
    try:
        shapes = [Shape.parse(text) for text in options.cases]
        kept = existing(options.out)
    except (ValueError, TuningFileError) as error:
        made.error(str(error))
    if not torch.cuda.is_available():
        made.error("tuning measures on a CUDA device, and none is visible here; run it on the machine with the GPU")
    run(options, shapes, torch.device("cuda", torch.cuda.current_device()), kept)
