"""Times of the fused ops against PyTorch's libraries, layer by layer of FastMETRO-S and -L.

    python -m bench fused [--batch 1 32 256] [--dtype float16] [--compile] [--all-configs] [--only TEXT]

Contenders: the library (F.layer_norm, cuBLAS with its ReLU epilogue, SDPA, four calls for pixels, in eager mode), with
`--compile` the same under torch.compile(mode="max-autotune-no-cudagraphs"), which takes minutes, and ours as the engine
calls it. With `--all-configs` ours also with every tile of the tables; at the end stand the entries that the table of
the linear layer should have. "floor" is the time that moving the bytes at 4.2 TB/s or multiplying at 790 TFLOP/s takes
at least; "ratio" is the library's time over ours.

Times are of one call in CUDA graphs of many, weights from memory: see measure.py. Every result is held against float64
before it is timed; if one of ours is wrong the command fails at its end and prints no time for it. The CSV is written
after every batch size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import common
from bench.fused import report
from bench.fused.basis import COMPILED, LIBRARY
from bench.fused.cases import all_cases
from bench.fused.measure import contenders, measure, precompile


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        "python -m bench fused", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--batch", type=int, nargs="+", default=[1, 32, 256])
    add("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    add("--seconds", type=float, default=0.1, help="for the rounds of a case")
    add("--compile", action="store_true", help="also the library under torch.compile")
    add("--all-configs", action="store_true", help="also every tile of the tables")
    add("--only", default="", help="cases whose name and shape contain this text")
    add("--csv", type=Path, help="default: bench/results/fused_<device>.csv")
    return made


def main() -> None:
    """Print a line per case, write the CSV; fail where a result of ours was wrong."""
    options = parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench fused measures GPU kernels, and no CUDA device is visible")
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    record = common.environment(device) | common.versions()
    print(f"{record['device']}, torch {record['torch']}, triton {record['triton']}, commit {record['commit']}")
    target = options.csv or common.results_csv("fused", device)
    rows: list[report.Row] = []
    found: report.Found = []
    for batch in options.batch:
        cases = [case for case in all_cases(batch, dtype) if options.only in f"{case.name} {case.shape}"]
        calls, seconds = precompile(cases, options.all_configs, device)
        print(f"\nbatch {batch}, {options.dtype}; {calls} calls compiled in {seconds:.1f} s\n{report.HEADER}")
        clocks = common.clocks(device)
        for case in cases:
            runs = contenders(case, options.compile, options.all_configs)
            entries = measure(case, runs, device, options.seconds)
            rows += report.rows(case, entries, clocks, record)
            found.append((case, entries))
            print(report.line(case, entries), flush=True)
        if rows:
            common.write_csv(target, rows)
    if not rows:
        raise SystemExit(f"--only {options.only!r}: no case has this in its name or shape")
    if options.all_configs:
        print(f"\nMEASURED in fastmetro_kernels/fused/linear/configs.py\n{report.table_entries(found)}")
        print(f"\nMEASURED in fastmetro_kernels/fused/linear/native.py\n{report.native_entries(found)}")
    print(f"\nwritten to {target}")
    ours = [entry for _, entries in found for entry in entries if entry.name not in (LIBRARY, COMPILED)]
    if any(entry.wrong for entry in ours):
        raise SystemExit("a result of ours is wrong: see the notes")
