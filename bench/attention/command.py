"""Topology-masked attention against everything PyTorch offers for it, in one process.

    python -m bench attention [--device cuda] [--cases 431x64x1 6890x64x32] [--dtype float16] [--contenders auto ...]

Contenders: ours by backend ("auto" is what users get); `scaled_dot_product_attention` with the mask, boolean or
additive (the faster counts as "SDPA + mask"), and dense without a mask; compiled FlexAttention with the tokens in
natural and in reverse Cuthill-McKee order. Each takes its best layout and, where it has several, its fastest variant.
FlexAttention is timed with PyTorch's default block mask of 128, too, where another one is faster: "best Flex" is the
fastest that was found, "default Flex" the faster order with the default, from which the targets were set.
On a GPU times are taken inside CUDA graphs, with warm and with cold L2, and as single calls; on a CPU as single calls.
Before a time is printed, output and gradients are held against float64 (all batch elements, or the first and the last
where tensors are large); a contender is wrong where it is more than twice as far off as masked SDPA, and the command
then fails at its end.

The floor is the time of moving every tensor once at the speed of a device-to-device copy, measured in the same run.
The CSV is written after every stage, so that a run that is cut off keeps what it has. At the end the targets for an
H200 are compared, as far as they were measured; `--report CSV` compares an earlier run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import common
from bench.attention import report, targets
from bench.attention.cases import PUBLISHED, Case, Shape
from bench.attention.contenders import DEFAULT_CPU, DEFAULT_CUDA, NAMES
from bench.attention.measure import Budget, Stage

CPU_CASES = ("431x64", "431x16", "1723x64", "6890x16", "6890x64")
DTYPES = ("float16", "bfloat16", "float32", "float64")
BUDGET_CUDA = 300.0


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        "python -m bench attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    add("--threads", type=int, default=2, help="of a CPU")
    add("--cases", nargs="+", metavar="CASE", help="VERTICESxDIM[xBATCH]; default on a GPU: the cases of the targets")
    add("--batch", type=int, default=1, help="of cases that name none")
    add("--modes", nargs="+", choices=report.PASSES, default=list(report.PASSES))
    add("--contenders", nargs="+", choices=NAMES, help="default: all but sdpa_cudnn; on a CPU auto and sdpa_bool")
    add("--flex-autotune", action="store_true", help="also FlexAttention autotuned by inductor: takes minutes")
    add("--repeats", type=int, default=0, help="rounds per case; 0: as many as fit the size")
    limit = f"seconds, beyond which costly variants are left out; 0: no limit; default on a GPU {BUDGET_CUDA:g}"
    add("--budget", type=float, help=limit)
    add("--data", type=Path, default=PUBLISHED, help="mesh_downsampling.npz of the published code")
    add("--csv", type=Path, help="default: bench/results/attention_<device>.csv")
    add("--report", type=Path, metavar="CSV", help="measure nothing, print the targets against that file")
    return made


def shapes(texts: Sequence[str] | None, batch: int, device: torch.device) -> list[Shape]:
    """The cases that are named, or the usual ones of the device."""
    if texts is None and device.type == "cuda":
        return list(targets.MUST_SHOW)
    return [Shape.parse(text, batch) for text in texts or CPU_CASES]


def run(options: argparse.Namespace, device: torch.device, wanted: Sequence[Shape]) -> list[report.Row]:
    """Measures all stages; prints and writes each as it is done."""
    cuda = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("float16" if cuda else "float32"))
    if not cuda:
        torch.set_num_threads(options.threads)
    record = common.environment(device) | common.versions()
    say(f"{record['device']}, torch {record['torch']}, triton {record['triton']}, commit {record['commit']}")
    names = options.contenders or (DEFAULT_CUDA if cuda else DEFAULT_CPU)
    seconds = options.budget if options.budget is not None else BUDGET_CUDA if cuda else 0.0
    budget = Budget(seconds, len(wanted) * len(options.modes))
    rows: list[report.Row] = []
    bandwidth = 0.0
    for shape in wanted:
        case = Case(shape, dtype, device, options.data)
        for mode in options.modes:
            backward = mode == report.PASSES[1]
            say(f"[{budget.elapsed():.0f} s] {shape} {mode}")
            stage = Stage(case, backward, options.flex_autotune, options.repeats, budget, say)
            # What a copy has reached so far: one that was disturbed may not lower the floor.
            bandwidth = max(bandwidth, common.copy_bandwidth(device)) if cuda else 0.0
            before = common.clocks(device)
            entries = stage.measure(list(names))
            conditions = report.Conditions(bandwidth, before, common.clocks(device))
            new = report.stage_rows(stage, entries, conditions, record)
            rows += new
            common.write_csv(options.csv or common.results_csv("attention", device), rows)
            say(report.stage_table(new))
            budget.stage += 1
    say(f"[{budget.elapsed():.0f} s] done")
    return rows


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)


def main() -> None:
    """Print the tables and write the CSV; fail where a result was wrong or a contender broke down."""
    options = (made := parser()).parse_args()
    device = torch.device(options.device)
    if options.data != PUBLISHED and not options.data.is_file():
        made.error(f"--data {options.data}: no such file; without this option spheres stand in for the body meshes")
    try:
        rows = report.read_rows(options.report) if options.report else []
        wanted = shapes(options.cases, options.batch, device)
    except (OSError, ValueError) as error:
        made.error(str(error))
    if not options.report:
        if device.type == "cuda" and not torch.cuda.is_available():
            made.error(f"--device {options.device}: no CUDA device is visible; accepted here: cpu")
        rows = run(options, device, wanted)
    if table := targets.must_show_table(rows):
        print(table)
    elif options.report:
        print("none of the targets was measured")
    if bad := [_complaint(row) for row in rows if row["status"] in ("wrong", "failed")]:
        raise SystemExit("\n".join(bad))


def _complaint(row: report.Row) -> str:
    case = f"{row['vertices']}x{row['dim']}x{row['batch']} {row['mode']}"
    return f"{case}, {row['contender']} {row['variant']}: {row['status']}: {row['reason']}"


if __name__ == "__main__":
    main()
