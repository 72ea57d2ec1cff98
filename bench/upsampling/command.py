"""Time of sparse_upsample against plain PyTorch and against merely writing its results.

    python -m bench upsampling [--device cuda] [--dtype float32 float16] [--batch 32 256] [--variants | --fused]

Contenders: ours by backend ("auto" is what users get), dense matmul, torch CSR, the published loop over samples; and,
on a GPU, two yardsticks that only write tensors of the shapes of the results. The matrices are the published ones where
`--data` (mesh_downsampling.npz of the published code) exists, else random ones of the same sizes and row lengths.
`--variants` also times every configuration of the CUDA kernels; from those the table in csrc/upsampling/launch.h is
chosen. `--fused` measures something else, what fusing with the layer before could save: see fused.py.

Every result is held against float64 before it is timed, on a GPU also inside the graphs; if one of ours is wrong the
command fails at its end and prints no time for it. On a GPU times are taken inside CUDA graphs, with warm and with cold
L2, and as single calls; on a CPU as single calls. The CSV is written after every case.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import common
from bench.upsampling import cases, fused, measure, report


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        "python -m bench upsampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    add = made.add_argument
    add("--device", default="cuda" if cuda else "cpu")
    add("--matrix", nargs="+", choices=cases.STEPS, help="default: all, on a GPU the first and the last")
    add("--dtype", nargs="+", default=["float32", "float16"] if cuda else ["float32"],
        choices=["float32", "float16", "bfloat16", "float64"])  # fmt: skip
    add("--batch", type=int, nargs="+", default=[1, 32, 256] if cuda else [1, 32])
    add("--channels", type=int, default=3)
    add("--passes", nargs="+", choices=cases.PASSES,
        help="default: forward and forward+backward; with --variants forward and backward")  # fmt: skip
    add("--variants", action="store_true", help="also every configuration of the CUDA kernels")
    add("--fused", action="store_true", help="only what fusing with the layer before could save")
    add("--rounds", type=int, default=0, help="0: as many as fit the time")
    add("--seconds", type=float, default=1.0, help="for the rounds of a case")
    add("--data", type=Path, default=cases.PUBLISHED)
    add("--csv", type=Path, help="default: bench/results/upsampling_<device>.csv")
    return made


def main() -> None:
    """Print a table per case and the targets, write the CSV; fail where a result of ours was wrong."""
    options = parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: no CUDA device is visible; accepted here: cpu")
    cuda = device.type == "cuda"
    record = common.environment(device) | common.versions()
    print(f"{record['device']}, torch {record['torch']}, triton {record['triton']}, commit {record['commit']}")
    if options.fused:
        fused.main(options.data, options.dtype, options.batch, device)
        return
    target = options.csv or common.results_csv("upsampling_variants" if options.variants else "upsampling", device)
    names = options.matrix or ([cases.STEPS[0], cases.STEPS[2]] if cuda else list(cases.STEPS))
    passes = options.passes or [cases.PASSES[0], cases.PASSES[2 if options.variants else 1]]
    rows: list[report.Row] = []
    for name, matrix in cases.matrices(options.data, names):
        matrix = matrix.to(device)
        for dtype in options.dtype:
            for batch in options.batch:
                case = cases.Case(name, matrix, batch, options.channels, getattr(torch, dtype), device)
                for which in passes:
                    entries = measure.measure(case, which, options.variants, options.rounds, options.seconds)
                    new = report.rows(case, which, entries, common.clocks(device), record)
                    rows += new
                    common.write_csv(target, rows)
                    print(f"\n{report.table(new)}", flush=True)
                    if wrong := [entry for entry in entries if entry.wrong]:
                        raise SystemExit("\n".join(f"{entry.name} is wrong: {entry.note}" for entry in wrong))
    print(f"\nwritten to {target}")
    if text := report.must_show(rows):
        print(text)
