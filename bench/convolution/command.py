"""Convolutions of the engine's trunks by this project's kernel against the library, layer by layer and as a whole.

    python -m bench convolution [--batch 1 8 32] [--trunk resnet50 hrnet-w64] [--dtype float16] [--tune FILE]
                                [--only layers] [--csv FILE]
    python -m bench convolution --batch 32 256 --only join
    python -m bench convolution --batch 1 8 32 256 --only stems
    python -m bench convolution --batch 32 256 --only endings

Every distinct layer that the kernel can take, recorded from the folded trunks: cuDNN's fused calls with its benchmark
search, cuBLASLt where the layer is a product of matrices, and ours with the tile that is chosen for it; "auto" says
whom the engine takes. Times are microseconds of one call in CUDA graphs of many. "floor" is what moving the bytes at
the bandwidth of a copy, or multiplying as the data sheet says, takes at least; "share" is the floor over ours. Errors
are relative L2 distances to float64; a result of ours that is off by more than twice the library's gets no time, and
the command fails at its end. Then whole trunks, and the figures that must be shown.

`--tune FILE` first times every usable tile of every layer, then the best of them in whole trunks, and writes the table
by which `auto` goes; the rest of the run uses it. To use it elsewhere, name it in FASTMETRO_KERNELS_CONVOLUTIONS, or
put it in the place of fastmetro_kernels/convolution/measured.json. With it `--only spreading` and `--only placing` go
on from a table in whole trunks alone: see resettle.py. `--only join` instead times the kernel with large tiles for the
ends of stages' first blocks, and prints the entries of its table: see join.py; `--only stems` the kernels of the
trunks' beginnings; `--only endings` the kernel for all that is behind a bottleneck's first convolution, against what
the engine takes without it, and prints the entries of its table: see endings.py. On a CPU the kernels' ops run on their
references, and nothing is written without `--csv`: a check of this command.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bench import common
from bench.convolution import endings, join, report, resettle, stems, trunks
from bench.convolution.layers import TRUNKS, Used, used_layers
from bench.convolution.measure import Case
from bench.convolution.tune import tune
from fastmetro_kernels.convolution import choice, native
from fastmetro_kernels.convolution.ending import ending_reasons
from fastmetro_kernels.tuning import TuningFileError

RESETTLING = {"spreading": resettle.spread, "placing": resettle.place_tiles}


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        "python -m bench convolution", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8, 32] if cuda else [1])
    add("--trunk", nargs="+", choices=TRUNKS, default=list(TRUNKS))
    add("--dtype", choices=["float16", "bfloat16", "float32"], default="float16" if cuda else "float32")
    add("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    add("--side", type=int, default=224, help="of the images, a multiple of 32")
    add("--rounds", type=int, default=20, help="samples of every time")
    add("--tune", type=Path, metavar="FILE", help="measure and write the table of tiles first")
    add(
        "--only",
        choices=["layers", "trunks", "tuning", *RESETTLING, "join", "stems", "endings"],
        help="default: layers, then trunks",
    )
    add(
        "--csv",
        type=Path,
        help="default: bench/results/convolution[_join, _stems, _endings]_<device>.csv, on a CPU none",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune if asked to, measure, print and write; fail where a result of ours was wrong."""
    options = (made := parser()).parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.side % 32 or options.side < 32:
        made.error(f"--side must be a multiple of 32, got {options.side}")
    if options.only in RESETTLING and options.tune is None:
        made.error(f"--only {options.only} writes a table: name it with --tune FILE")
    if device.type == "cuda" and (why := native.reasons(device, dtype)):
        made.error(f"the kernel cannot run: {'; '.join(why)}")
    if options.tune is not None and device.type != "cuda":
        made.error("--tune measures the kernel on a GPU of compute capability 9.0, got --device cpu")
    torch.backends.cudnn.benchmark = True
    record = common.environment(device) | common.versions()
    print(f"{record['device']}, torch {record['torch']}, commit {record['commit']}, {options.dtype}")
    uses = {trunk: Counter[Used]() for trunk in options.trunk}
    for trunk in options.trunk:
        for images in options.batch:
            uses[trunk].update(used_layers(trunk, images, options.side))
    with torch.no_grad():
        if options.tune is not None:
            try:
                _tune(RESETTLING.get(options.only, tune), options.tune, uses, options.side, dtype, device)
            except TuningFileError as error:
                made.error(str(error))
        if options.only == "join":
            return _join(options, uses, dtype, device, record)
        if options.only == "stems":
            return _stems(options, dtype, device, record)
        if options.only == "endings":
            return _endings(options, dtype, device, record)
        found = _layers(uses, dtype, device, options.rounds) if options.only in (None, "layers") else []
        rows = [row | record for row in report.layer_rows(found, uses, dtype)]
        _write(options.csv, rows, device)
        outcomes = _trunks(options, dtype, device) if options.only in (None, "trunks") else []
        if outcomes:
            _write(options.csv, rows + [row | record for row in report.trunk_rows(outcomes, dtype)], device)
    if wrong := sum(bool(one.note) for one in found):
        raise SystemExit(f"results of ours are wrong for {wrong} layers: see the notes")


def _join(
    options: argparse.Namespace,
    uses: Mapping[str, Counter[Used]],
    dtype: torch.dtype,
    device: torch.device,
    record: Mapping[str, str],
) -> None:
    """The kernel with large tiles; fails where a result of it was wrong."""
    found, rows = join.run(uses, dtype, device, options.rounds)
    _write(options.csv, [row | record for row in rows], device, "convolution_join")
    if wrong := sum(map(join.is_wrong, found)):
        raise SystemExit(f"results of ours are wrong for {wrong} layers: see the notes")


def _stems(options: argparse.Namespace, dtype: torch.dtype, device: torch.device, record: Mapping[str, str]) -> None:
    """The trunks' beginnings at all batch sizes, a line for each; fails where a result of ours was wrong."""
    bandwidth = common.copy_bandwidth(device) if device.type == "cuda" else None
    found = []
    for trunk in options.trunk:
        for images in options.batch:
            found.append(stems.compare(trunk, images, options.side, dtype, device, options.rounds, bandwidth))
            print(stems.lines(found[-1]), flush=True)
        _write(options.csv, [row | record for row in stems.rows(found, dtype)], device, "convolution_stems")
    if wrong := sum(one.is_wrong for one in found):
        raise SystemExit(f"results of ours are wrong for {wrong} stems")


def _endings(options: argparse.Namespace, dtype: torch.dtype, device: torch.device, record: Mapping[str, str]) -> None:
    """The kernel for the ends of bottlenecks; fails where it cannot run or a result of it was wrong."""
    if device.type == "cuda" and (why := ending_reasons(device, dtype)):
        raise SystemExit(f"the kernel cannot run: {'; '.join(why)}")
    found, rows = endings.run(options.batch, options.side, dtype, device, options.rounds)
    _write(options.csv, [row | record for row in rows], device, "convolution_endings")
    if wrong := sum(bool(one.note) for one in found):
        raise SystemExit(f"results of ours are wrong for {wrong} ends of blocks: see the notes")


def _write(path: Path | None, rows: list[report.Row], device: torch.device, name: str = "convolution") -> None:
    """What there is so far; on a CPU only where it was asked for."""
    target = path or (common.results_csv(name, device) if device.type == "cuda" else None)
    if rows and target is not None:
        common.write_csv(target, rows)
        print(f"written to {target}")


def _tune(
    settle: Callable[..., None],
    path: Path,
    uses: Mapping[str, Counter[Used]],
    side: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Write the table, and let the rest of this run go by it."""
    start = time.monotonic()
    settle(uses, side, dtype, device, path, lambda text: print(text, flush=True))
    os.environ[choice.ENVIRONMENT] = str(path)
    choice.reset()
    print(f"{path} written after {time.monotonic() - start:.0f} s; to use it: {choice.ENVIRONMENT}={path}")


def _layers(
    uses: Mapping[str, Counter[Used]], dtype: torch.dtype, device: torch.device, rounds: int
) -> list[report.Measured]:
    """All distinct layers of the trunks, a line for each, and sums over the trunks."""
    bandwidth = common.copy_bandwidth(device) if device.type == "cuda" else None
    if bandwidth:
        print(f"bandwidth of a copy {bandwidth / 1e12:.2f} TB/s")
    print(report.HEADER)
    found = []
    for used in dict.fromkeys(used for counts in uses.values() for used in counts):
        found.append(report.measure(Case(used, dtype, device), rounds, bandwidth))
        print(report.line(found[-1]), flush=True)
    print(report.sums(found, uses))
    return found


def _trunks(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[trunks.Outcome]:
    """All trunks at all batch sizes, a line for each, and the targets."""
    print("whole trunks, microseconds")
    outcomes = []
    for trunk in options.trunk:
        for images in options.batch:
            outcomes.append(trunks.compare(trunk, images, options.side, dtype, device, options.rounds))
            print(trunks.line(outcomes[-1]), flush=True)
    if device.type == "cuda":
        print(trunks.target_table(outcomes))
    return outcomes
