"""When the kernels of a trunk do what: blocks' own clocks, as a table, a picture and numbers.

    python -m bench.convolution.timeline [--trunk resnet50] [--batch 1] [--together] [--json FILE] [--picture FILE]

The trunk runs as one CUDA graph with a variant of the kernel that notes the clock of its multiprocessor at every step.
Clocks of different multiprocessors have nothing to do with one another, so spans are taken within a block, and the time
from one kernel to the next on multiprocessors that ran both. `--together`: with tiles that leave room for other blocks
of their kernel, to see where these settle. Pairs run as two kernels here, and kernels that repeat
their results, take one copy for all taps, or make the end of a block note nothing: where such lie between two
kernels that do, they are counted.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench import common
from bench.convolution.layers import TRUNKS
from bench.convolution.trunks import make_trunk
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution import ConvolutionConfig, ops
from fastmetro_kernels.convolution.ops import STAMPS

STEPS = {
    "asks": ("waited", "asked"),
    "fetches and multiplies": ("asked", "multiplied"),
    "exchanges": ("multiplied", "exchanged"),
    "stores": ("exchanged", "stored"),
}
REPLAYS = 20


@dataclass(frozen=True)
class Kernel:
    """One kernel of the trunk, microseconds.

    Attributes:
        layer: what it computes.
        blocks: how many.
        multiprocessors: how many of them had a block.
        most: blocks that one of them had.
        early: from its start to the end of its wait for the kernel in front, median of its blocks.
        steps: `STEPS`, medians of its blocks.
        longest: from the end of the wait to the last store, of the slowest block.
        next: from a last store to the end of the next noting kernel's wait on the same multiprocessor, the shortest;
            None where none ran both.
        between: kernels that note nothing, between this one and the next.
    """

    layer: str
    blocks: int
    multiprocessors: int
    most: int
    early: float
    steps: dict[str, float]
    longest: float
    next: float | None
    between: int


@dataclass
class Noted:
    """What a kernel noted: its name, stamps [blocks, `STAMPS`], and how many kernels behind it note nothing."""

    name: str
    stamps: np.ndarray
    between: int = 0


def record(trunk: str, images: int, device: torch.device, together: bool = False) -> list[Noted]:
    """Kernels of the trunk that note times, of the last of some replays."""
    backbone, pixels = make_trunk(trunk, images, 224, device)
    folded, x = fold_backbone(backbone, torch.float16), pixels.to(torch.float16, memory_format=torch.channels_last)
    kept: list[Noted] = []
    stamps: list[Tensor] = []
    convolution_native, ending, join = ops.convolution_native, kernels.convolution_ending, kernels.convolution_join

    def unnoted(run: Callable[..., Any], *arguments: object, **more: object) -> Any:
        if kept:
            kept[-1].between += 1
        return run(*arguments, **more)

    def noted(*arguments: object) -> Tensor:
        *others, scale, config = arguments
        if together:
            config = list(map(int, ConvolutionConfig(*config)._replace(alone=False)))
        if scale != 1 or ConvolutionConfig(*config).once:
            return unnoted(convolution_native, *others, scale, config)
        out, times = ops.convolution_timeline_native(*others, config)
        kept.append(Noted(_name(*others, config), np.empty(0)))
        stamps.append(times)
        return out

    with (
        torch.no_grad(),
        mock.patch.object(ops, "convolution_native", noted),
        mock.patch.object(kernels, "convolution_ending", functools.partial(unnoted, ending)),
        mock.patch.object(kernels, "convolution_join", functools.partial(unnoted, join)),
        mock.patch.object(kernels, "choose_pair", lambda *_: None),
    ):
        folded(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.clear(), stamps.clear()
            folded(x)
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    for one, times in zip(kept, stamps, strict=True):
        one.stamps = times.cpu().numpy()
    return kept


def _name(*arguments: object) -> str:
    x, weight, config = arguments[0], arguments[1], arguments[-1]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(config, list)
    outputs, down, across, channels = weight.shape
    tile = ",".join(map(str, config))
    return f"{x.shape[1]}x{x.shape[2]}, {channels} -> {outputs}, {down}x{across}/{arguments[6]} ({tile})"


def summarize(kept: Sequence[Noted], clocks_per_us: float) -> list[Kernel]:
    """Medians of every kernel.

    Args:
        kept: of :func:`record`.
        clocks_per_us: of a multiprocessor.
    """
    found = []
    for number, one in enumerate(kept):
        at = {stamp: one.stamps[:, place] / clocks_per_us for place, stamp in enumerate(STAMPS)}
        steps = {step: float(np.median(at[end] - at[begin])) for step, (begin, end) in STEPS.items()}
        gap = _gap(one.stamps, kept[number + 1].stamps) if number + 1 < len(kept) else None
        following = None if gap is None else gap / clocks_per_us
        early, longest = np.median(at["waited"] - at["started"]), np.max(at["stored"] - at["waited"])
        _, shares = np.unique(one.stamps[:, STAMPS.index("multiprocessor")], return_counts=True)
        spread = len(one.stamps), len(shares), int(shares.max())
        found.append(Kernel(one.name, *spread, float(early), steps, float(longest), following, one.between))
    return found


def _gap(own: np.ndarray, following: np.ndarray) -> float | None:
    """Shortest time, in clocks, from a kernel's last store on a multiprocessor to the end of the next one's wait.

    None where no multiprocessor ran both.
    """
    place = {name: index for index, name in enumerate(STAMPS)}
    last: dict[int, int] = {}
    for row in own:
        key = int(row[place["multiprocessor"]])
        last[key] = max(last.get(key, 0), int(row[place["stored"]]))
    gaps = [row[place["waited"]] - last[int(row[-1])] for row in following if int(row[-1]) in last]
    return float(min(gaps)) if gaps else None


def draw(kernels: Sequence[Kernel], path: Path) -> None:
    """One bar per kernel, from the end of its wait on, and behind it the time to the end of the next one's wait.

    Where kernels that note nothing lie between, that time is written down instead.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.19 * len(kernels) + 1.2), layout="constrained")
    rows = np.arange(len(kernels))
    begin = np.zeros(len(kernels))
    for step, color in zip(STEPS, ("#e0a030", "#4a7fb5", "#7d5ba6", "#5c9e6e"), strict=True):
        widths = np.array([kernel.steps[step] for kernel in kernels])
        axes.barh(rows, widths, left=begin, color=color, label=step, height=0.75)
        begin += widths
    gaps = np.array([(not kernel.between and kernel.next) or 0.0 for kernel in kernels])
    axes.barh(rows, gaps, left=begin, color="#d8d8d8", label="until the next kernel's wait is over", height=0.75)
    for row, kernel in enumerate(kernels):
        if kernel.between:
            until = f": {kernel.next:.1f} until the next begins" if kernel.next else ""
            text = f"then {kernel.between} not timed{until}"
            axes.text(begin[row] + 0.05, row, text, fontsize=6, va="center")
    axes.set_yticks(rows, [kernel.layer for kernel in kernels], fontsize=6.5)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("microseconds since the kernel in front had finished (medians of the blocks)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.35, 1.0), ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, print, and write."""
    parser = argparse.ArgumentParser(
        "python -m bench.convolution.timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trunk", choices=TRUNKS, default="resnet50")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="no blocks alone on a multiprocessor")
    parser.add_argument("--json", type=Path, help="default: bench/results/convolution_timeline_<device>.json")
    parser.add_argument("--picture", type=Path, help="draws all kernels of the trunk")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU of compute capability 9.0")
    device = torch.device("cuda")
    kept = record(options.trunk, options.batch, device, options.together)
    megahertz = common.clocks(device)[0] or torch.cuda.clock_rate(device)
    found = summarize(kept, float(megahertz))
    for kernel in found:
        steps = "  ".join(f"{step} {value:.2f}" for step, value in kernel.steps.items())
        rest = f"longest {kernel.longest:.2f}" + ("" if kernel.next is None else f"  next {kernel.next:.2f}")
        rest += f"  {kernel.between} between" if kernel.between else ""
        where = f"{kernel.blocks:4} blocks on {kernel.multiprocessors:3}, at most {kernel.most}"
        print(f"{kernel.layer:48} {where}  {steps}  {rest}")
    print(f"sum of the longest {sum(kernel.longest for kernel in found):.1f} us")
    target = options.json or common.results_csv("convolution_timeline", device).with_suffix(".json")
    rows = [asdict(kernel) for kernel in found]
    target.write_text(json.dumps(common.environment(device) | {"sm_mhz": megahertz, "kernels": rows}, indent=1) + "\n")
    if options.picture is not None:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
