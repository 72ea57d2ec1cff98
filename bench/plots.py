"""Pictures of the attention benchmark on a GPU: time against vertices, and the achieved share of the memory floor.

    python -m bench plots [--csv bench/results/attention_h200.csv] [--out docs/images] [--dtype float16] [--batch 32]

Takes the CSV of `python -m bench attention` and writes attention_time.png and attention_floor.png. Times are those
inside CUDA graphs that the CSV counts (cold L2, warm at batch 1), forward and forward + backward side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.attention.contenders import MASKED_SDPA
from bench.attention.report import PASSES, Row, read_rows
from bench.common import RESULTS, ROOT


class Series(NamedTuple):
    """A line or a colour of bars: the fastest of some contenders."""

    label: str
    contenders: tuple[str, ...]
    colour: str


SERIES = (
    Series("ours, CUDA", ("native",), "#c8102e"),
    Series("ours, Triton", ("triton",), "#f28e2b"),
    Series("ours, plain PyTorch", ("reference",), "#d9a6c2"),
    Series("SDPA, dense, no mask", ("sdpa_dense",), "#9ecae1"),
    Series("SDPA + mask", MASKED_SDPA, "#1f5a94"),
    Series("FlexAttention, RCM order", ("flex_rcm",), "#4d4d4d"),
    Series("FlexAttention, natural order", ("flex_natural",), "#a3a3a3"),
)
LABELLED_SHARE = 0.05  # bars from here on carry their share


def counted_time(row: Row) -> float | None:
    """Milliseconds inside a CUDA graph, of the kind that the row counts; None where nothing was measured there."""
    column = {"warm": "warm_ms", "cold": "cold_ms"}.get(row["counted"])
    return float(row[column]) if column and row["status"] == "ok" and row[column] else None


def selected(rows: Sequence[Row], dtype: str, batch: int) -> list[Row]:
    """Rows with a time inside a CUDA graph, of one dtype and batch.

    Raises:
        ValueError: there is none.
    """
    found = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, str(batch)) and counted_time(row)]
    if not found:
        raise ValueError(f"the CSV holds no times inside CUDA graphs in {dtype} at batch {batch}")
    return found


def fastest_rows(rows: Sequence[Row], series: Series) -> dict[int, Row]:
    """By number of vertices, the row of the fastest contender of the series."""
    found: dict[int, Row] = {}
    for row in rows:
        if row["contender"] in series.contenders:
            best = found.setdefault(int(row["vertices"]), row)
            if (counted_time(row) or 0) < (counted_time(best) or 0):
                found[int(row["vertices"])] = row
    return dict(sorted(found.items()))


def draw_times(rows: Sequence[Row], path: Path) -> None:
    """One panel per head dim and pass, logarithmic both ways, one line per contender; `rows` from `selected`."""
    dims = sorted({int(row["dim"]) for row in rows}, reverse=True)
    figure, panels = plt.subplots(len(dims), 2, figsize=(11, 4.2 * len(dims)), layout="constrained", squeeze=False)
    for line, dim in zip(panels, dims, strict=True):
        for axes, mode in zip(line, PASSES, strict=True):
            _draw_panel(axes, [row for row in rows if row["mode"] == mode and row["dim"] == str(dim)])
            axes.set_title(f"{mode}, head dim {dim}", fontsize=10)
    _finish(figure, list(panels.flat), rows, path)


def _draw_panel(axes: Axes, rows: Sequence[Row]) -> None:
    for series in SERIES:
        if points := fastest_rows(rows, series):
            ours = series.label.startswith("ours, ")
            times = [counted_time(row) for row in points.values()]
            axes.loglog(
                list(points), times, color=series.colour, label=series.label,
                marker="o", ms=5 if ours else 4, lw=2.2 if ours else 1.4, zorder=3 if ours else 2,
            )  # fmt: skip
    if floor := {int(row["vertices"]): float(row["floor_ms"]) for row in rows if row["floor_ms"]}:
        axes.loglog(sorted(floor), [floor[n] for n in sorted(floor)], "k:", label="memory floor")
    axes.set_xticks(sorted({int(row["vertices"]) for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("vertices, beside 14 hubs")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)


def draw_shares(rows: Sequence[Row], path: Path) -> None:
    """Bars: memory floor over time, of every contender and shape; `rows` from `selected`.

    Raises:
        ValueError: no row has a share.
    """
    rows = [row for row in rows if row["floor_share"]]
    if not rows:
        raise ValueError("the CSV holds no shares of the memory floor")
    figure, panels = plt.subplots(2, 1, figsize=(11, 7), layout="constrained", sharex=True)
    shapes = sorted({(int(row["dim"]), int(row["vertices"])) for row in rows}, key=lambda shape: (-shape[0], shape[1]))
    present = [series for series in SERIES if any(row["contender"] in series.contenders for row in rows)]
    width = 0.86 / len(present)
    for axes, mode in zip(panels, PASSES, strict=True):
        for number, series in enumerate(present):
            for place, (dim, vertices) in enumerate(shapes):
                own = [row for row in rows if (row["mode"], row["dim"]) == (mode, str(dim))]
                row = fastest_rows(own, series).get(vertices)
                if row is None:
                    continue
                share = float(row["floor_share"])
                x = place + (number - (len(present) - 1) / 2) * width
                axes.bar(x, share, width, color=series.colour, label=series.label)
                if share >= LABELLED_SHARE:
                    axes.annotate(f"{share * 100:.0f}", (x, share), (0, 2), textcoords="offset points",
                                  ha="center", fontsize=8)  # fmt: skip
        axes.set_xticks(range(len(shapes)), [f"{vertices} vertices\nhead dim {dim}" for dim, vertices in shapes])
        axes.set_title(mode, fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(y=0.12)
        axes.set_ylabel("memory floor / time")
    _finish(figure, list(panels), rows, path)


def _finish(figure: Figure, panels: Sequence[Axes], rows: Sequence[Row], path: Path) -> None:
    """One legend in the order of `SERIES`, the title, and the file."""
    found = {}
    for axes in panels:
        found.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    labels = [label for label in (*(series.label for series in SERIES), "memory floor") if label in found]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    first = rows[0]
    title = f"{first['device']}, {first['dtype']}, {first['heads']} heads, batch {first['batch']}"
    figure.suptitle(f"Attention over a mesh: {title}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def default_csv() -> Path:
    """The only CSV of a GPU among the results.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = sorted(path for path in RESULTS.glob("attention_*.csv") if path.name != "attention_cpu.csv")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{RESULTS} must hold one attention_<GPU>.csv, found {names}; name one with --csv")
    return found[0]


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="default: the one attention_<GPU>.csv in bench/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    try:
        rows = selected(read_rows(options.csv or default_csv()), options.dtype, options.batch)
        options.out.mkdir(parents=True, exist_ok=True)
        draw_times(rows, options.out / "attention_time.png")
        draw_shares(rows, options.out / "attention_floor.png")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(options.out / "attention_time.png", options.out / "attention_floor.png", sep="\n")


if __name__ == "__main__":
    main()
