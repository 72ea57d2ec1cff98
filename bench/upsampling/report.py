"""Rows of the CSV, the table of one case, and the table of what must be shown on an H200."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.upsampling.cases import CSR_NAMES, PASSES, WRITES, Case
from bench.upsampling.measure import Entry, fastest

Row = dict[str, str]
KINDS = ("warm", "cold", "call")
COLUMNS = (
    "matrix", "batch", "channels", "dtype", "passes", "name", "error", *(f"{kind}_us" for kind in KINDS),
    "counted", "over_writing", "csr_over_it", "note", "sm_mhz", "memory_mhz",
)  # fmt: skip
"""Beside those of `common.environment` and `common.versions`. `over_writing` is the time over that of the faster
yardstick, `csr_over_it` that of the faster form of torch CSR over it, both of the kind that is named in `counted`."""


def rows(case: Case, which: str, entries: Sequence[Entry], clocks: tuple[str, str], common: Row) -> list[Row]:
    """One row per entry. What counts is the time with cold L2 inside a graph, where there is one."""
    counted = next((k for k in ("cold", "warm", "call") if any(e.median(k) is not None for e in entries)), "call")
    writing, csr = fastest(entries, WRITES, counted), fastest(entries, CSR_NAMES, counted)
    found = []
    for entry in entries:
        time = entry.median(counted)
        row = dict.fromkeys(COLUMNS, "")
        row |= {"matrix": case.name, "batch": str(case.batch), "channels": str(case.channels), "passes": which}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "name": entry.name, "note": entry.note}
        row |= {"error": "" if entry.error is None else f"{entry.error:.2e}", "counted": counted}
        for kind in KINDS:
            milliseconds = entry.median(kind)
            row[f"{kind}_us"] = "" if milliseconds is None else f"{milliseconds * 1e3:.4g}"
        row["over_writing"] = f"{time / writing:.3g}" if time and writing else ""
        row["csr_over_it"] = f"{csr / time:.3g}" if time and csr else ""
        row |= dict(zip(("sm_mhz", "memory_mhz"), clocks, strict=True))
        found.append(row | common)
    return found


def table(found: Sequence[Row]) -> str:
    """The rows of one case as text, variants by time."""
    first = found[0]
    layout = "  {:<36} {:>9} {:>9} {:>9} {:>9} {:>9}  {}"
    lines = [
        f"{first['matrix']} x {first['channels']}, batch {first['batch']}, {first['dtype']}, {first['passes']}",
        layout.format("microseconds", "warm", "cold", "call", "/ write", "CSR / it", ""),
    ]

    def order(row: Row) -> tuple[bool, float]:
        variant = row["name"].startswith("variant")
        return variant, float(row[f"{row['counted']}_us"] or "inf") if variant else 0.0

    for row in sorted(found, key=order):
        cells = [row[f"{kind}_us"] or "-" for kind in KINDS] + [row["over_writing"] or "-", row["csr_over_it"] or "-"]
        lines.append(layout.format(row["name"], *cells, row["note"]).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True)
class Target:
    """What "ours, auto" must reach for 1723 -> 6890 x 3."""

    batch: int
    passes: str
    column: str
    limit: float

    def met(self, value: float) -> bool:
        """Whether the measured value is good enough."""
        return value <= self.limit if self.column == "over_writing" else value >= self.limit


TARGETS = tuple(
    Target(batch, *rest)
    for batch in (32, 256)
    for rest in (
        (PASSES[0], "over_writing", 1.5),
        (PASSES[0], "csr_over_it", 8.0),
        (PASSES[1], "csr_over_it", 8.0),
    )
)


def must_show(found: Sequence[Row]) -> str:
    """Targets, what was measured in CUDA graphs, and whether that is enough; empty where nothing of it was measured."""
    measured = {
        (row["dtype"], int(row["batch"]), row["passes"]): row
        for row in found
        if row["name"] == "ours, auto" and row["counted"] != "call" and row["channels"] == "3"
        and row["matrix"].endswith("1723->6890")
    }  # fmt: skip
    lines = []
    for dtype in sorted({key[0] for key in measured}):
        for target in TARGETS:
            value = measured.get((dtype, target.batch, target.passes), {}).get(target.column, "")
            what = "time / writing the output" if target.column == "over_writing" else "torch CSR / time"
            sign = "<=" if target.column == "over_writing" else ">="
            got = f"{value} {'yes' if target.met(float(value)) else 'NO'}" if value else "not measured"
            lines.append(f"  {dtype}, batch {target.batch}, {target.passes}: {what} {sign} {target.limit:g}: {got}")
    return "\n".join(["Must show on an H200, 1723 -> 6890 x 3, CUDA graphs", *lines]) if lines else ""
