"""Rows of the CSV, the table of a stage, and the table of what must be shown on an H200."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.attention.cases import HEADS, HUBS, Shape
from bench.attention.contenders import DENSE, FLEX, MASKED_SDPA
from bench.attention.measure import Entry, Stage, ratios

Row = dict[str, str]

PASSES = ("forward", "forward+backward")
KINDS = ("warm", "cold", "wall")
RATIOS = ("sdpa_ratio", "flex_ratio", "dense_ratio")
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


def fastest(entries: Sequence[Entry], names: Sequence[str], kind: str) -> Entry | None:
    """The fastest timed entry among the names."""
    timed = [(entry.median(kind), entry) for entry in entries if entry.name in names and entry.status == "ok"]
    found = [(time, entry) for time, entry in timed if time is not None]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def stage_rows(stage: Stage, entries: Sequence[Entry], conditions: Conditions, common: Row) -> list[Row]:
    """One row per entry; `common` are the columns that all rows of a run share."""
    case, counted = stage.case, stage.counted
    shape: Row = dict(
        zip(SHAPE_COLUMNS, (str(case.shape.vertices), str(HUBS), str(HEADS), str(case.shape.dim),
            str(case.shape.batch), str(case.dtype).removeprefix("torch."), PASSES[stage.backward]), strict=True)
    )  # fmt: skip
    groups = zip(RATIOS, (MASKED_SDPA, FLEX, (DENSE,)), strict=True)
    baselines = {name: fastest(entries, group, counted) for name, group in groups}
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
    layout = "  {:<14} {:<22} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>7} {:>9}"
    heads = ("contender", "variant", "warm ms", "cold ms", "call ms", "fastest", "vs SDPA", "vs Flex", "vs dense")
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


@dataclass(frozen=True)
class Target:
    """A ratio (or a share of the floor) that the contender "auto" must reach."""

    shape: Shape
    mode: str
    column: str
    least: float


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; None where it was not."""

    target: Target
    measured: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached."""
        return None if self.measured is None else self.measured >= self.target.least


_RATIOS = {  # vertices, dim, batch: forward vs SDPA + mask, vs best Flex; forward + backward vs SDPA + mask, vs Flex
    Shape(431, 64, 1): (6, 15, 3.8, 8),
    Shape(431, 64, 32): (5, 22, 3.2, 10),
    Shape(431, 16, 32): (10, 12, 7, 10),
    Shape(1723, 64, 32): (14, 28, 10, 13),
    Shape(6890, 64, 32): (32, 11, 33, 6.5),
    Shape(6890, 16, 32): (75, 8, 82, 8),
}
_PLACES = tuple((mode, column) for mode in PASSES for column in ("sdpa_ratio", "flex_ratio"))
MUST_SHOW = tuple(_RATIOS)
TARGETS = (
    *(Target(shape, *place, row[index]) for shape, row in _RATIOS.items() for index, place in enumerate(_PLACES)),
    Target(Shape(431, 64, 32), PASSES[0], "dense_ratio", 1.0),
    Target(Shape(6890, 64, 32), PASSES[0], "floor_share", 0.55),
)
AIMS = (
    Target(Shape(431, 64, 32), PASSES[0], "sdpa_ratio", 6.0),
    Target(Shape(431, 64, 32), PASSES[1], "sdpa_ratio", 4.0),
)
"""Beyond the targets."""


def evaluate(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """The targets against the rows of "auto" in float16 with 14 hubs and 8 heads.

    A ratio counts only where it comes from CUDA graphs.
    """
    found = {}
    for row in rows:
        right = (row["contender"], row["dtype"], row["hubs"], row["heads"]) == ("auto", "float16", "14", "8")
        if right and row["status"] == "ok" and row["counted"] != "wall":
            shape = Shape(int(row["vertices"]), int(row["dim"]), int(row["batch"]))
            found[shape, row["mode"]] = row
    verdicts = []
    for target in targets:
        value = found.get((target.shape, target.mode), {}).get(target.column, "")
        verdicts.append(Verdict(target, float(value) if value else None))
    return verdicts


def must_show_table(rows: Sequence[Row]) -> str:
    """Targets, what was measured, and whether that is enough, as text; empty where nothing of it was measured."""
    verdicts = evaluate(rows)
    if all(verdict.measured is None for verdict in verdicts):
        return ""
    layout = "  {:<22}" + " {:>22}" * 4
    heads = (f"{'fwd' if mode == 'forward' else 'fwd+bwd'} vs {_BASELINES[column]}" for mode, column in _PLACES)
    lines = ["Must show on an H200: times faster (target), of CUDA-graph times", layout.format("case", *heads)]
    for shape in MUST_SHOW:
        cells = {(v.target.mode, v.target.column): _cell(v, "x") for v in verdicts if v.target.shape == shape}
        name = f"{shape.vertices}, d {shape.dim}, batch {shape.batch}"
        lines.append(layout.format(name, *(cells[place] for place in _PLACES)))
    for verdict in (*verdicts, *evaluate(rows, AIMS)):
        target = verdict.target
        aim = target in AIMS
        if (target.mode, target.column) in _PLACES and not aim:
            continue
        share = target.column == "floor_share"
        what = "share of the copy bandwidth" if share else f"{'aim ' if aim else ''}vs {_BASELINES[target.column]}"
        lines.append(f"  {target.shape} {target.mode}, {what}: {_cell(verdict, '' if share else 'x')}")
    lines += boolean_lines(rows)
    missed = sum(verdict.met is False for verdict in verdicts)
    unknown = sum(verdict.met is None for verdict in verdicts)
    met = len(verdicts) - missed - unknown
    lines.append(f"  {met} of {len(verdicts)} met, {missed} missed, {unknown} not measured")
    return "\n".join(lines)


def boolean_lines(rows: Sequence[Row]) -> list[str]:
    """Times faster than SDPA with the boolean mask alone, case by case.

    "SDPA + mask" is the faster of the boolean and the additive mask. The figures from which the targets were set are
    those of the boolean one; the additive one, made in advance in the dtype of q, saves up to half.
    """
    times: dict[tuple[Shape, str, str], float] = {}
    for row in rows:
        counted = row[f"{row['counted']}_ms"]
        if row["contender"] in ("auto", "sdpa_bool") and row["status"] == "ok" and counted and row["counted"] != "wall":
            shape = Shape(int(row["vertices"]), int(row["dim"]), int(row["batch"]))
            times[shape, row["mode"], row["contender"]] = float(counted)
    lines = []
    for target in TARGETS:
        ours, theirs = (times.get((target.shape, target.mode, name)) for name in ("auto", "sdpa_bool"))
        if target.column == "sdpa_ratio" and ours and theirs:
            cell = _cell(Verdict(target, theirs / ours), "x")
            lines.append(f"  {target.shape} {target.mode}, vs SDPA + boolean mask: {cell}")
    return lines


_BASELINES = {"sdpa_ratio": "SDPA + mask", "flex_ratio": "best Flex", "dense_ratio": "dense SDPA, no mask"}


def _cell(verdict: Verdict, unit: str) -> str:
    target = f"({verdict.target.least:g}{unit})"
    if verdict.measured is None:
        return f"- {target}"
    return f"{verdict.measured:.2f}{unit} {target} {'yes' if verdict.met else 'NO'}"
