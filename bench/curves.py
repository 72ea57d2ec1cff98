"""Learning curves of training runs, from their logs.

    python -m bench curves NAME=out/run/log.csv [NAME=...] [--values loss pa_mpjpe] [--out docs/images/curves.png]

One plot per value of the logs, against the number of images seen; several runs of one name are one colour.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.common import ROOT

COLOURS = ("#c8102e", "#1f5a94", "#f28e2b", "#4d4d4d", "#59a14f", "#8e6bbd")
Curve = tuple[str, list[dict[str, str]]]


def read_curve(text: str) -> Curve:
    """Name and rows of ``NAME=FILE``.

    Raises:
        ValueError: there is no such file, or it is no log.
    """
    name, _, file = text.partition("=")
    path = Path(file)
    if not name or not path.is_file():
        raise ValueError(f"expected NAME=FILE with a file that exists, got {text!r}")
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or "samples" not in rows[0]:
        raise ValueError(f"{path} is no log of a training")
    return name, rows


def draw(curves: Sequence[Curve], values: Sequence[str], path: Path) -> None:
    """One plot per value, side by side.

    Raises:
        ValueError: no run has a value.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    figure, plots = plt.subplots(
        1, len(values), figsize=(5.4 * len(values), 3.8), squeeze=False, layout="constrained"
    )
    for axes, value in zip(plots[0], values, strict=True):
        drawn = set()
        for name, rows in curves:
            points = [(float(row["samples"]) / 1e3, float(row[value])) for row in rows if row.get(value)]
            if points:
                label = None if name in drawn else name
                axes.plot(*zip(*points, strict=True), color=COLOURS[names.index(name) % len(COLOURS)], label=label)
                drawn.add(name)
        if not drawn:
            plt.close(figure)
            raise ValueError(f"no run has {value!r}")
        axes.set_xlabel("thousand images seen")
        axes.set_ylabel(f"{value} (mm)" if "mp" in value else value)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    plots[0][0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        "python -m bench curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--values", nargs="+", default=["loss", "pa_mpjpe"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "curves.png")
    options = parser.parse_args(arguments)
    try:
        draw([read_curve(text) for text in options.curves], options.values, options.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(options.out)
