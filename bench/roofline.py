"""A picture of how near the engine's parts come to what the device can do.

    python -m bench roofline [--csv bench/results/fps_h200.csv] [--out docs/images/engine_roofline.png]

Takes the engine's rows of a CSV of `python -m bench fps` on an H200. A point is a part at one batch size: to the right
the FLOP per byte that it has to do at least (`fastmetro.profiling.work`), up what it reaches in its measured time. The
roof is the data sheet's for products and a measured copy's for bytes; a part whose weights are still in L2 may stand
above the slope.
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
from matplotlib.lines import Line2D

from bench.common import RESULTS, ROOT
from fastmetro.models import create_model
from fastmetro.profiling.fps import COLUMNS, ENGINE, NETWORK
from fastmetro.profiling.record import Row, read_rows
from fastmetro.profiling.work import Work, part_work

FLOP_PER_SECOND, BYTES_PER_SECOND = 989e12, 4.24e12
"""Of an H200: half-precision products by its data sheet (dense), and measured copies (attention_h200.csv)."""
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
COLOURS = {"backbone": "#1f5a94", "encoder": "#f28e2b", "decoder": "#c8102e", "upsampling": "#4d4d4d"}
LABELS = {"backbone": (0, -15), "encoder": (0, 7), "decoder": (0, 7), "upsampling": (9, -4)}
"""Where the number of images stands beside a point."""


class Point(NamedTuple):
    """A part of a network at one batch size."""

    network: str
    batch: int
    part: str
    work: Work
    seconds: float

    @property
    def speed(self) -> float:
        """FLOP per second."""
        return self.work.flop / self.seconds

    @property
    def share(self) -> float:
        """Of what the roof allows."""
        return self.speed / min(FLOP_PER_SECOND, self.work.intensity * BYTES_PER_SECOND)


def points(rows: Sequence[Row]) -> list[Point]:
    """Of the engine's rows on an H200 in half precision.

    Raises:
        ValueError: there is none.
    """
    found = []
    for row in rows:
        engine = (row["contender"], row["scope"], row["status"]) == (ENGINE, NETWORK, "ok")
        if not engine or "H200" not in row["device"] or BYTES[row["dtype"]] != 2:
            continue
        model = create_model(row["model"], row["backbone"], row["mesh"], row["upsampling"])
        work = part_work(model, int(row["batch"]), BYTES[row["dtype"]])
        for part in row["parts_ms"].split("; "):
            name, milliseconds = part.rsplit(" ", 1)
            if name in COLOURS:
                title = f"{row['model'].removeprefix('fastmetro-').upper()}, {row['backbone']}"
                found.append(Point(title, int(row["batch"]), name, work[name], float(milliseconds) / 1e3))
    if not found:
        raise ValueError("no row of the engine on an H200 in half precision with times of its parts")
    return found


def draw(found: Sequence[Point], path: Path) -> None:
    """The picture: side by side, one plot per network."""
    networks = list(dict.fromkeys(point.network for point in found))
    size = (6.4 * len(networks) + 0.6, 4.8)
    figure, plots = plt.subplots(1, len(networks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, network in zip(plots[0], networks, strict=True):
        _roof(axes, found)
        for point in (point for point in found if point.network == network):
            where = point.work.intensity, point.speed / 1e12
            axes.plot(*where, "o", markersize=7, color=COLOURS[point.part])
            right, up = LABELS[point.part]
            right *= -1 if point.batch > 100 else 1  # away from the label of 32 images, whose point is near
            axes.annotate(
                str(point.batch), where, xytext=(right, up), fontsize=8, color=COLOURS[point.part],
                textcoords="offset points", ha="left" if right > 0 else "right" if right < 0 else "center",
            )  # fmt: skip
        axes.set_title(network, fontsize=11)
        axes.set_xlabel("FLOP per byte that has to be moved")
        axes.spines[["top", "right"]].set_visible(False)
    plots[0][0].set_ylabel("TFLOP/s")
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in COLOURS.items()]
    plots[0][-1].legend(handles=handles, loc="lower right", frameon=False, fontsize=9)
    figure.suptitle("The engine's parts on an H200, half precision; numbers: images per call", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _roof(axes: Axes, found: Sequence[Point]) -> None:
    left = min(point.work.intensity for point in found) / 3
    right = max(max(point.work.intensity for point in found) * 3, 3e3)
    knee = FLOP_PER_SECOND / BYTES_PER_SECOND
    heights = [left * BYTES_PER_SECOND / 1e12, FLOP_PER_SECOND / 1e12, FLOP_PER_SECOND / 1e12]
    axes.loglog([left, knee, right], heights, color="black", linewidth=1.2)
    axes.annotate("4.24 TB/s", (knee / 20, FLOP_PER_SECOND / 20e12), xytext=(-8, 8), textcoords="offset points",
                  rotation=32, fontsize=9, ha="right")  # fmt: skip
    axes.annotate("989 TFLOP/s", (right, FLOP_PER_SECOND / 1e12), xytext=(0, 5), textcoords="offset points",
                  fontsize=9, ha="right")  # fmt: skip


def main() -> None:
    """Draw, and print the shares."""
    parser = argparse.ArgumentParser(
        "python -m bench roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "fps_h200.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "engine_roofline.png")
    options = parser.parse_args()
    try:
        found = points(read_rows(options.csv, COLUMNS))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    draw(found, options.out)
    for point in found:
        print(
            f"{point.network:<14} {point.batch:>4}  {point.part:<11} {point.work.intensity:8.1f} FLOP/byte "
            f"{point.speed / 1e12:8.2f} TFLOP/s {point.share:6.1%} of the roof"
        )
    print(options.out)


if __name__ == "__main__":
    main()
