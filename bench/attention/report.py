"""Rows of the CSV, the table of a stage, and the table of what must be shown on an H200."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.attention.cases import HEADS, HUBS
from bench.attention.contenders import DENSE, FLEX, FLEX_DEFAULT, MASKED_SDPA
from bench.attention.measure import Entry, Stage, ratios

Row = dict[str, str]

PASSES = ("forward", "forward+backward")
KINDS = ("warm", "cold", "wall")


@dataclass(frozen=True)
class Baseline:
    """What a ratio is held against: the fastest of the contenders, in any variant or in one."""

    label: str
    contenders: tuple[str, ...]
    variant: str | None = None

    def includes(self, contender: str, variant: str) -> bool:
        """Whether that contender in that variant is one of them."""
        return contender in self.contenders and self.variant in (None, variant)


BASELINES = {
    "sdpa_ratio": Baseline("SDPA + mask", MASKED_SDPA),
    "flex_ratio": Baseline("best Flex", FLEX),
    "flex_default_ratio": Baseline("default Flex", FLEX, FLEX_DEFAULT),
    "dense_ratio": Baseline("dense SDPA, no mask", (DENSE,)),
}
RATIOS = tuple(BASELINES)
SHAPE_COLUMNS = ("vertices", "hubs", "heads", "dim", "batch", "dtype", "mode")
COLUMNS = (
    *SHAPE_COLUMNS, "contender", "variant", "status", "reason", "warm_ms", "cold_ms", "wall_ms", "wall_fastest_ms",
    "counted", *RATIOS, "relative_error", "max_error", "floor_ms", "floor_share",
    "copy_gb_s", "sm_mhz_before", "sm_mhz_after", "memory_mhz_before", "memory_mhz_after", "mesh",
)  # fmt: skip
"""Beside those of `common.environment` and `common.versions`. Ratios are the baseline's time over the row's."""


@dataclass(frozen=True)
class Conditions:
    """What a stage ran under: bytes per second of a device copy (0: not measured), clocks before and after."""

    bandwidth: float = 0.0
    before: tuple[str, str] = ("", "")
    after: tuple[str, str] = ("", "")


def fastest(entries: Sequence[Entry], baseline: Baseline, kind: str) -> Entry | None:
    """The fastest timed entry of the baseline."""
    right = [e for e in entries if e.status == "ok" and baseline.includes(e.name, e.variant.name if e.variant else "")]
    timed = [(entry.median(kind), entry) for entry in right]
    found = [(time, entry) for time, entry in timed if time is not None]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def stage_rows(stage: Stage, entries: Sequence[Entry], conditions: Conditions, common: Row) -> list[Row]:
    """One row per entry; `common` are the columns that all rows of a run share."""
    case, counted = stage.case, stage.counted
    shape: Row = dict(
        zip(SHAPE_COLUMNS, (str(case.shape.vertices), str(HUBS), str(HEADS), str(case.shape.dim),
            str(case.shape.batch), str(case.dtype).removeprefix("torch."), PASSES[stage.backward]), strict=True)
    )  # fmt: skip
    baselines = {name: fastest(entries, baseline, counted) for name, baseline in BASELINES.items()}
    floor = case.floor_bytes(stage.backward) / conditions.bandwidth * 1e3 if conditions.bandwidth else None
    rows = []
    for entry in entries:
        row = dict.fromkeys(COLUMNS, "") | shape | {"mesh": case.mesh, "counted": counted}
        row |= {"contender": entry.name, "variant": entry.variant.name if entry.variant else ""}
        row |= {"status": entry.status, "reason": entry.reason}
        if entry.errors:
            row["relative_error"] = f"{max(error.relative for error in entry.errors):.2e}"
            row["max_error"] = f"{max(error.largest for error in entry.errors):.2e}"
        row |= {"floor_ms": _number(floor), "copy_gb_s": f"{conditions.bandwidth / 1e9:.0f}" if floor else ""}
        row |= dict(zip(("sm_mhz_before", "memory_mhz_before"), conditions.before, strict=True))
        row |= dict(zip(("sm_mhz_after", "memory_mhz_after"), conditions.after, strict=True))
        if entry.status == "ok":
            row |= {f"{kind}_ms": _number(entry.median(kind)) for kind in KINDS}
            row["wall_fastest_ms"] = _number(entry.fastest_wall)
            for name, baseline in baselines.items():
                values = ratios(entry, baseline, counted)
                row[name] = f"{statistics.median(values):.4g}" if values else ""
            cold = entry.median("cold")
            row["floor_share"] = f"{floor / cold:.3f}" if floor and cold else ""
        rows.append(row | common)
    return rows


def _number(milliseconds: float | None) -> str:
    """Four digits are enough, and the floor of a small case has them."""
    return "" if milliseconds is None else f"{milliseconds:.4g}" if milliseconds < 1000 else f"{milliseconds:.1f}"


def stage_table(rows: Sequence[Row]) -> str:
    """The rows of one stage as text."""
    first = rows[0]
    title = f"{HUBS}+{first['vertices']}, d {first['dim']}, batch {first['batch']}, {first['dtype']}, {first['mode']}"
    if first["floor_ms"]:
        title += f"; floor {first['floor_ms']} ms at {first['copy_gb_s']} GB/s"
    if first["sm_mhz_before"]:
        clocks = (f"{first[f'{unit}_mhz_before']} -> {first[f'{unit}_mhz_after']}" for unit in ("sm", "memory"))
        title += "; clocks {} and {} MHz".format(*clocks)
    layout = "  {:<14} {:<22} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8} {:>7} {:>9}"
    ratio_heads = ("vs SDPA", "best Flex", "def. Flex", "vs dense")
    heads = ("contender", "variant", "warm ms", "cold ms", "call ms", "fastest", *ratio_heads)
    lines = [title, layout.format(*heads, "floor", "error")]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"  {row['contender']:<14} {row['variant']:<22} {row['status']}: {row['reason']}")
            continue
        times = [row[f"{kind}_ms"] or "-" for kind in KINDS]
        over = [f"{float(row[name]):.2f}x" if row[name] else "-" for name in RATIOS]
        share = f"{float(row['floor_share']):.0%}" if row["floor_share"] else "-"
        cells = (*times, row["wall_fastest_ms"], *over, share, row["relative_error"])
        lines.append(layout.format(row["contender"], row["variant"], *cells))
    return "\n".join(lines)


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV of this benchmark.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} is no CSV of `python -m bench attention`: it lacks {', '.join(missing)}")
        return list(reader)
