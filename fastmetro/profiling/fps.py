"""`fastmetro bench fps`: the engine and what it is compared with, case by case, as a table and as a CSV file."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmetro.inference.predictor import default_device
from fastmetro.models import BACKBONES, FastMETRO
from fastmetro.profiling.case import Case, Entry, Say, stage_medians
from fastmetro.profiling.contenders import ENGINE, build_model
from fastmetro.profiling.latency import Latency, median_ratio
from fastmetro.profiling.parts import WHOLE
from fastmetro.profiling.record import Row, environment, write_rows
from fastmetro.profiling.settings import FpsSettings
from fastmetro.profiling.trace import write_trace

NETWORK = "network"
FILE_TO_FILE = "file to file"
COLUMNS = (
    "model", "backbone", "mesh", "upsampling", "weights", "batch", "dtype", "scope", "contender", "variant", "status",
    "reason", "p50_ms", "p90_ms", "p99_ms", "fastest_ms", "mean_ms", "calls", "images_per_second", "times_engine",
    "memory_mib", "joules_per_image", "watts", "sm_mhz", "max_vertex_error_mm", "allowed_error_mm", "parts_ms",
    "plain_parts_ms", "clocks_mhz",
)  # fmt: skip
"""Beside those of :func:`fastmetro.profiling.record.environment`. `times_engine`: the row's time over the engine's."""
NOT_TOLD = "not told"
Built = tuple[FastMETRO, str]
"""A network on its device, and where its weights come from."""


@dataclass(frozen=True)
class Network:
    """The columns that name what ran."""

    model: str
    backbone: str
    mesh: str
    upsampling: str
    weights: str


def name_network(model: FastMETRO, weights: str) -> Network:
    """The columns of a model; a backbone that has no name of its own goes by its class."""
    names = {maker: name for name, maker in BACKBONES.items()}
    backbone = names.get(type(model.backbone), type(model.backbone).__name__)
    return Network(model.config.name, backbone, model.mesh.name, model.config.upsampling, weights)


def command_line() -> str:
    """What was typed, without the place of the program."""
    program = Path(sys.argv[0]).name
    return " ".join(["fastmetro" if program in ("__main__.py", "fastmetro") else program, *sys.argv[1:]])


def device_of(settings: FpsSettings) -> torch.device:
    """Where everything runs.

    Raises:
        ValueError: that is a GPU, and there is none.
    """
    device = torch.device(settings.device) if settings.device else default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is there, got {settings.device!r} and PyTorch sees no GPU")
    return device


def build_network(settings: FpsSettings) -> Built:
    """The network of the settings on its device, in float32 and evaluation mode, and where its weights come from.

    Raises:
        ValueError, FileNotFoundError: the device is not there, or see :func:`build_model`.
    """
    device = device_of(settings)
    model, weights = build_model(settings)
    return model.to(device).requires_grad_(False), weights


def run_fps(
    settings: FpsSettings, say: Say = print, command: str | None = None, built: Built | None = None
) -> list[Row]:
    """Measure every batch size; print each table as it is done, and write the CSV file after each.

    Args:
        settings: what, against what, on what, for how long.
        say: told about progress and results.
        command: for the rows; what was typed by default.
        built: what `build_network` made of settings with the same network and device, not to make it again.

    Returns:
        One row per contender, batch size and scope; "status" is "wrong" or "failed" where there is no time.

    Raises:
        ValueError: a name or value that is not accepted, or an image in a network without faces.
    """
    device = device_of(settings)
    dtype = getattr(torch, settings.dtype or ("float16" if device.type == "cuda" else "float32"))
    compile_tuned = settings.compile if settings.compile is not None else device.type == "cuda"
    model, weights = built or build_network(settings)
    network = name_network(model, weights)
    record = environment(device, command or command_line())
    say(f"{network.model}, {network.backbone}, {network.mesh}, weights: {weights}; {record['device']}, "
        f"torch {record['torch']}, commit {record['commit']}")  # fmt: skip
    rows: list[Row] = []
    for batch in settings.batch:
        say(f"batch {batch}:")
        case = Case(model, batch, dtype, settings, compile_tuned, say)
        case.measure([ENGINE, *settings.baseline])
        new = [row | record for row in case_rows(case, network)]
        rows += new
        if settings.out is not None:
            write_rows(settings.out, rows)
        say(case_table(new))
        if settings.trace is not None and batch == settings.batch[0]:
            write_trace(settings.trace, case.contenders(), case.images())
        del case
        _forget()
    return rows


def _forget() -> None:
    """Compiled code and graphs of one case must not hold memory in the next."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def case_rows(case: Case, network: Network) -> list[Row]:
    """Rows of a case: the network alone, then from file to file where that was timed."""
    named = {name: str(value) for name, value in vars(network).items()}
    named |= {"batch": str(case.batch), "dtype": str(case.dtype).removeprefix("torch."), "clocks_mhz": case.clocks}
    engine = next((entry for entry in case.entries if entry.name == ENGINE), None)
    rows = []
    for scope in (NETWORK, FILE_TO_FILE):
        for entry in case.entries:
            if scope == FILE_TO_FILE and not entry.file_samples:
                continue
            row = dict.fromkeys(COLUMNS, "") | named
            row |= {"scope": scope, "contender": entry.name, "status": entry.status, "reason": entry.reason}
            row["variant"] = entry.contender.description if entry.contender else ""
            if entry.verdict is not None:
                row["max_vertex_error_mm"] = f"{entry.verdict.error_mm:.4g}"
                row["allowed_error_mm"] = f"{entry.verdict.limit_mm:.4g}"
            if rounds := _rounds(entry, scope):
                row |= _times(rounds, case.batch, _rounds(engine, scope) if engine else [])
            if scope == NETWORK and entry.status == "ok":
                row |= _resources(entry, case.batch)
            if scope == NETWORK and entry.name == ENGINE:
                row["plain_parts_ms"] = _listed(case.plain_parts)
            parts = stage_medians(entry.file_samples) if scope == FILE_TO_FILE else entry.parts
            rows.append(row | {"parts_ms": _listed(parts)})
    return rows


def _rounds(entry: Entry, scope: str) -> list[list[float]]:
    """Milliseconds by round."""
    if scope == NETWORK:
        return entry.samples
    return [[sum(times.values())] for times in entry.file_samples]


def _times(rounds: list[list[float]], batch: int, engine: list[list[float]]) -> Row:
    latency = Latency.of([time for one in rounds for time in one])
    row = {f"{name}_ms": f"{getattr(latency, name):.4g}" for name in ("p50", "p90", "p99", "fastest", "mean")}
    row |= {"calls": str(latency.calls), "images_per_second": f"{1e3 * batch / latency.mean:.5g}"}
    return row | ({"times_engine": f"{median_ratio(rounds, engine):.4g}"} if engine else {})


def _resources(entry: Entry, batch: int) -> Row:
    row = dict.fromkeys(("memory_mib", "joules_per_image", "watts", "sm_mhz"), NOT_TOLD)
    if entry.memory_mib is not None:
        row["memory_mib"] = f"{entry.memory_mib:.0f}"
    if entry.load is not None:
        row |= {"joules_per_image": f"{entry.load.joules / batch:.4g}"}
        row |= {"watts": f"{entry.load.watts:.0f}", "sm_mhz": f"{entry.load.sm_mhz:.0f}"}
    return row


def _listed(times: Mapping[str, float]) -> str:
    """ "backbone 0.526; encoder 0.05": milliseconds by name."""
    return "; ".join(f"{name} {value:.4g}" for name, value in times.items())


def case_table(rows: Sequence[Row]) -> str:
    """The rows of one case as text."""
    layout = "  {:<10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9} {:>9} {:>9} {:>6} {:>6} {:>9}"
    heads = ("", "p50 ms", "p90", "p99", "fastest", "mean", "images/s", "engine x", "MiB", "J/image", "W", "MHz",
             "error mm")  # fmt: skip
    columns = ("p50_ms", "p90_ms", "p99_ms", "fastest_ms", "mean_ms", "images_per_second", "times_engine",
               "memory_mib", "joules_per_image", "watts", "sm_mhz", "max_vertex_error_mm")  # fmt: skip
    lines: list[str] = []
    for scope in (NETWORK, FILE_TO_FILE):
        mine = [row for row in rows if row["scope"] == scope]
        if not mine:
            continue
        lines.append(layout.format(scope[:10] if scope == NETWORK else "file/file", *heads[1:]))
        for row in mine:
            if row["status"] != "ok":
                lines.append(f"  {row['contender']:<10} {row['status']}: {row['reason']}")
                continue
            lines.append(layout.format(row["contender"], *(row[column] or "-" for column in columns)))
        for row in mine:
            if scope == NETWORK and row["status"] == "ok":
                lines.append(f"  {row['contender']}: {row['variant']}{'; ' + row['reason'] if row['reason'] else ''}")
            lines += _shares(row["contender"], row["parts_ms"])
            lines += _shares("plain path", row["plain_parts_ms"])
    return "\n".join(lines)


def _shares(name: str, listed: str) -> list[str]:
    """One line of parts with their shares of the sum."""
    if not listed:
        return []
    parts = {name: float(value) for name, _, value in (part.rpartition(" ") for part in listed.split("; "))}
    total = sum(value for part, value in parts.items() if not part.startswith(WHOLE))
    cells = [
        f"{part} {value:.4g} ms" + ("" if part.startswith(WHOLE) else f" ({value / total:.0%})")
        for part, value in parts.items()
    ]
    return [f"  {name}, parts: {', '.join(cells)}"]


def all_right(rows: Sequence[Row]) -> bool:
    """Whether every contender computed the right thing."""
    return all(row["status"] == "ok" for row in rows)
