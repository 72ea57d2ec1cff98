"""Pictures of the attention benchmark on a GPU: time against vertices, and the achieved share of the memory floor.

    python -m bench plots [--csv bench/results/attention_cuda.csv] [--out docs/images]

Takes the CSV of `python -m bench attention` and writes attention_time.png and attention_floor.png. Times are those
inside CUDA graphs that the CSV counts (cold L2 except at batch 1), forward and forward + backward side by side.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.attention.report import Row, read_rows
from bench.common import RESULTS, ROOT

MODES = ("forward", "forward+backward")
LABELS = {
    "native": "ours, CUDA", "triton": "ours, Triton", "reference": "ours, plain PyTorch", "sdpa_bool": "SDPA + mask",
    "sdpa_additive": "SDPA + additive mask", "sdpa_dense": "SDPA, dense, no mask", "flex_natural": "FlexAttention",
    "flex_rcm": "FlexAttention, RCM order",
}  # fmt: skip
COLOURS = {
    "native": "#d1495b", "triton": "#edae49", "reference": "#8d6a9f", "sdpa_bool": "#00798c",
    "sdpa_additive": "#66a5ad", "sdpa_dense": "#30638e", "flex_natural": "#9a9a9a", "flex_rcm": "#4d4d4d",
}  # fmt: skip
BATCH = "32"


def counted_time(row: Row) -> float | None:
    """Milliseconds inside a CUDA graph, of the kind that the row counts; None where nothing was measured there."""
    column = {"warm": "warm_ms", "cold": "cold_ms"}.get(row["counted"])
    return float(row[column]) if column and row["status"] == "ok" and row[column] else None


def draw_times(rows: Sequence[Row], path: Path) -> None:
    """One panel per pass and head dim, logarithmic both ways, one line per contender.

    Raises:
        ValueError: there is no time of a CUDA graph among the rows.
    """
    rows = [row for row in rows if row["batch"] == BATCH and row["contender"] in LABELS and counted_time(row)]
    if not rows:
        raise ValueError(f"the CSV holds no times inside CUDA graphs at batch {BATCH}")
    dims = sorted({int(row["dim"]) for row in rows})
    figure, panels = plt.subplots(len(dims), 2, figsize=(11, 4.2 * len(dims)), layout="constrained", squeeze=False)
    for line, dim in zip(panels, dims, strict=True):
        for axes, mode in zip(line, MODES, strict=True):
            _draw_panel(axes, [row for row in rows if row["mode"] == mode and row["dim"] == str(dim)])
            axes.set_title(f"{mode}, head dim {dim}", fontsize=10)
    handles = {h.get_label(): h for axes in panels.flat for h in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, 8 heads, batch {BATCH}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axes: Axes, rows: Sequence[Row]) -> None:
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        milliseconds = counted_time(row)
        assert milliseconds is not None
        lines[row["contender"]][int(row["vertices"])] = milliseconds
        if row["floor_ms"]:
            lines["floor"][int(row["vertices"])] = float(row["floor_ms"])
    for name, points in lines.items():
        x = sorted(points)
        style = {"color": "black", "ls": ":", "label": "floor of device memory"}
        if name != "floor":
            style = {"color": COLOURS[name], "ls": "-", "marker": "o", "ms": "4", "label": LABELS[name]}
        axes.loglog(x, [points[n] for n in x], **style)  # type: ignore[arg-type]
    axes.set_xticks(sorted({int(row["vertices"]) for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_xlabel("vertices")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.3)


def draw_shares(rows: Sequence[Row], path: Path) -> None:
    """Bars: floor over time, of every contender and shape at batch 32.

    Raises:
        ValueError: there is no share of the floor among the rows.
    """
    rows = [row for row in rows if row["batch"] == BATCH and row["contender"] in LABELS and row["floor_share"]]
    rows = [row for row in rows if counted_time(row)]
    if not rows:
        raise ValueError(f"the CSV holds no share of the memory floor at batch {BATCH}")
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    for axes, mode in zip(panels, MODES, strict=True):
        own = [row for row in rows if row["mode"] == mode]
        shapes = sorted({(int(row["vertices"]), int(row["dim"])) for row in own})
        names = [name for name in LABELS if any(row["contender"] == name for row in own)]
        width = 0.8 / max(len(names), 1)
        for number, name in enumerate(names):
            bars = {(int(r["vertices"]), int(r["dim"])): float(r["floor_share"]) for r in own if r["contender"] == name}
            x = [shapes.index(shape) + (number - (len(names) - 1) / 2) * width for shape in bars]
            axes.bar(x, list(bars.values()), width, color=COLOURS[name], label=LABELS[name])
        axes.set_xticks(range(len(shapes)), [f"{vertices}\nd {dim}" for vertices, dim in shapes])
        axes.set_title(mode, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("share of the memory floor")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, 8 heads, batch {BATCH}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "attention_cuda.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    try:
        rows = read_rows(options.csv)
        options.out.mkdir(parents=True, exist_ok=True)
        draw_times(rows, options.out / "attention_time.png")
        draw_shares(rows, options.out / "attention_floor.png")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(options.out / "attention_time.png", options.out / "attention_floor.png", sep="\n")


if __name__ == "__main__":
    main()
