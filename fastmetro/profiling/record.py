"""Where a figure was taken, and CSV files that appear whole or not at all."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmetro.files import replacing

Row = dict[str, str]
_ROOT = Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    """The product name of the chip that runs the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def commit() -> str:
    """Hash of the checked-out commit, with `+` when tracked files differ; "unknown" outside a repository.

    The environment variable `FASTMETRO_COMMIT` names it where the files are a copy without its history.
    """
    if named := os.environ.get("FASTMETRO_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=_ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=_ROOT, capture_output=True)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def environment(device: torch.device, command: str) -> Row:
    """Columns that every row carries: device, versions, commit, date (UTC) and the command line."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": (torch.version.cuda or "") if device.type == "cuda" else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
    }


def ask_gpu(device: torch.device, *fields: str) -> list[float] | None:
    """Numbers that nvidia-smi tells about a device now, e.g. "clocks.sm" in MHz; None where it does not tell all."""
    if device.type != "cuda":
        return None
    name = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    chosen = ["-i", name if name.startswith("GPU-") else f"GPU-{name}"] if name else []
    query = ["nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
        values = [float(value) for value in answer.stdout.partition("\n")[0].split(",")]
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return values if answer.returncode == 0 and len(values) == len(fields) else None


def clocks(device: torch.device) -> str:
    """Clocks of the multiprocessors and of the memory in MHz, now: "1980/3201"; empty where nobody tells."""
    values = ask_gpu(device, "clocks.sm", "clocks.mem")
    return "/".join(f"{value:.0f}" for value in values) if values else ""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a whole CSV file or not at all.

    Raises:
        ValueError: there is no row, or rows have different columns.
    """
    if not rows:
        raise ValueError(f"rows: nothing to write to {path}")
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"rows must have the same columns; expected {columns}, got {list(row)}")
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, needed: Sequence[str]) -> list[Row]:
    """Rows of a CSV file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a needed column is missing.
    """
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        return list(reader)
