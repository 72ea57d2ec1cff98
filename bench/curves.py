"""Learning curves of training runs, from their logs.

    python -m bench curves NAME=out/run/log.csv [NAME=...] [--values loss pa_mpjpe] [--out docs/images/curves.png]
                           [--csv FILE]
    python -m bench curves FILE

One plot per value of the logs, against the number of images seen; several runs of one name are one colour. --csv writes
all logs into one file, which is what the second form draws.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.common import ROOT, write_csv

COLOURS = ("#c8102e", "#1f5a94", "#f28e2b", "#4d4d4d", "#59a14f", "#8e6bbd")
Curve = tuple[str, list[dict[str, str]]]


def read_curves(text: str) -> list[Curve]:
    """Names and rows of ``NAME=FILE``, or of a FILE that :func:`write_curves` wrote.

    Raises:
        ValueError: there is no such file, or it is no log.
    """
    name, given, file = text.partition("=") if not Path(text).is_file() else ("", "", text)
    path = Path(file)
    if (given and not name) or not path.is_file():
        raise ValueError(f"expected NAME=FILE, or the FILE of several runs, that exists, got {text!r}")
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or "samples" not in rows[0]:
        raise ValueError(f"{path} is no log of a training")
    if name:
        return [(name, rows)]
    if not {"run", "number"} <= rows[0].keys():
        raise ValueError(f"{path} is the log of one run: give it a name, NAME={path}")
    parts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        parts.setdefault((row["run"], row["number"]), []).append(row)
    return [(run, part) for (run, _), part in parts.items()]


def write_curves(path: Path, curves: Sequence[Curve]) -> None:
    """All logs in one file: their columns, the name of the run, and which one of that name it is, from 0."""
    columns = dict.fromkeys(name for _, rows in curves for name in rows[0] if name not in ("run", "number"))
    count: Counter[str] = Counter()
    written = []
    for name, rows in curves:
        where = {"run": name, "number": str(count[name])}
        written += [{**where, **{column: row.get(column, "") for column in columns}} for row in rows]
        count[name] += 1
    write_csv(path, written)


def draw(curves: Sequence[Curve], values: Sequence[str], path: Path) -> None:
    """One plot per value, side by side.

    Raises:
        ValueError: no run has a value.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    figure, plots = plt.subplots(1, len(values), figsize=(5.4 * len(values), 3.8), squeeze=False, layout="constrained")
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
    parser.add_argument("curves", nargs="+", metavar="[NAME=]FILE")
    parser.add_argument("--values", nargs="+", default=["loss", "pa_mpjpe"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "curves.png")
    parser.add_argument("--csv", type=Path, help="write all logs into this file, too")
    options = parser.parse_args(arguments)
    try:
        curves = [curve for text in options.curves for curve in read_curves(text)]
        draw(curves, options.values, options.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if options.csv:
        write_curves(options.csv, curves)
    print(options.out)
