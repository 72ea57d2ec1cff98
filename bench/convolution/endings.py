"""`python -m bench convolution --only endings`: what is behind the first convolution of the first stage's bottlenecks.

It may be one kernel (`convolution_ending`), in three modes: with the block's input as the shortcut and the next block's
first convolution; with the shortcut alone; with the first block's downsample branch and the next block's first
convolution. Against it stand the library's calls for the same layers, and what the engine takes for them without this
kernel: ours or the library's, as its tables say. Both trunks have the same layers there. The last lines are entries of
`MEASURED` in `fastmetro_kernels/convolution/ending_configs.py`: from how many of the measured images on the kernel is
faster than both others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from bench.convolution import report
from bench.convolution.layers import FLOP_PER_SECOND
from bench.convolution.measure import GRAPH_CALLS, LARGEST_BYTES, SETS, Timer, take_in_turn
from bench.convolution.tune import ERROR_FACTOR
from fastmetro.inference.engine.convolution import block_end, convolution
from fastmetro.inference.engine.weights import AUTO, BlockWeights, ConvolutionWeights
from fastmetro.models.backbones.blocks import Bottleneck
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution.ending import NARROW, WIDE
from fastmetro_kernels.convolution.ending_configs import FOLLOWING, JOINED, MEASURED, MODES

LIBRARY, ENGINE, ENDING = "library", "engine", "ending"
STAGE = 4
"""Pixels of an image down and across for each position of the first stage."""
CHECKED = 8
"""Images that are held against float64, about: from the first to the last."""
LAYOUT = "{:34} {:>7} {:>7} {:>8} {:>8} {:>8} {:>6} {:>6}  {:>8} {:>8}"
HEADER = LAYOUT.format(
    "images of height x width, mode", "bytes", "flop", LIBRARY, ENGINE, ENDING, "ratio", "share", "error", LIBRARY
)


class Ending(NamedTuple):
    """A block's end: images, height and width of its maps, and one of `MODES`."""

    images: int
    height: int
    width: int
    mode: str

    def __str__(self) -> str:
        return f"{self.images} of {self.height}x{self.width}, {self.mode}"

    @property
    def weights(self) -> int:
        """Numbers of all weights; each is used once for each position."""
        return 9 * NARROW * NARROW + WIDE * (NARROW * (2 if self.mode == JOINED else 1) + FOLLOWING[self.mode])

    @property
    def rows(self) -> int:
        """Positions of all images."""
        return self.images * self.height * self.width

    def flop(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.rows * self.weights

    def elements(self) -> int:
        """Numbers that have to be read or written once."""
        shortcut = NARROW if self.mode == JOINED else WIDE
        return self.rows * (NARROW + shortcut + WIDE + FOLLOWING[self.mode]) + self.weights

    def floors(self, element_size: int, bytes_per_second: float) -> tuple[float, float]:
        """Microseconds that moving the bytes and that multiplying takes at least."""
        return 1e6 * self.elements() * element_size / bytes_per_second, 1e6 * self.flop() / FLOP_PER_SECOND


class Inputs(NamedTuple):
    """Of one call: what the block's first convolution gives, the block's input, and weights."""

    inner: Tensor
    x: Tensor
    block: BlockWeights
    following: ConvolutionWeights | None


@dataclass(frozen=True)
class Measured:
    """A block's end: microseconds and errors by contender.

    Attributes:
        floors_us: by bytes and by operations; None on a CPU.
        note: why the kernel has no time.
    """

    ending: Ending
    times: Mapping[str, float]
    errors: Mapping[str, float]
    floors_us: tuple[float, float] | None
    note: str = ""

    @property
    def others_us(self) -> float:
        """Of the faster of the others."""
        return min(self.times[LIBRARY], self.times[ENGINE])

    @property
    def is_faster(self) -> bool:
        """Whether the kernel is faster than both others."""
        return ENDING in self.times and self.times[ENDING] < self.others_us


def endings(batches: Sequence[int], side: int) -> list[Ending]:
    """All modes for images of side x side pixels."""
    return [Ending(images, side // STAGE, side // STAGE, mode) for mode in MODES for images in batches]


def make_inputs(ending: Ending, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random images and weights, results about 1 in size."""
    generator = torch.Generator(device).manual_seed(seed)

    def images(channels: int) -> Tensor:
        size = ending.images, channels, ending.height, ending.width
        made = torch.randn(size, generator=generator, device=device).relu_()  # as what is in front of them
        return made.to(dtype).contiguous(memory_format=torch.channels_last)

    outside = NARROW if ending.mode == JOINED else WIDE
    block = BlockWeights(Bottleneck(outside, NARROW).to(device), dtype)
    following = None
    if outputs := FOLLOWING[ending.mode]:
        following = ConvolutionWeights(nn.Conv2d(WIDE, outputs, 1, device=device), dtype)
    inputs = Inputs(images(NARROW), images(outside), block, following)
    for layer in _layers(inputs):
        outputs, *depth = layer.weight.shape
        weight = torch.randn(layer.weight.shape, generator=generator, device=device)
        # Rounded once for all, so that nobody's bias is more exact than another's.
        bias = torch.randn(outputs, generator=generator, device=device).to(dtype).float()
        layer.load(weight * torch.Size(depth).numel() ** -0.5, None if layer.bias is None else bias)
    return inputs


def _layers(inputs: Inputs) -> list[ConvolutionWeights]:
    layers = [one for one in inputs.block.modules() if isinstance(one, ConvolutionWeights)]
    return layers if inputs.following is None else [*layers, inputs.following]


def others(inputs: Inputs, convolutions: str) -> list[Tensor]:
    """By the engine without the kernel for ends, its convolutions by one of `CONVOLUTIONS`."""
    for layer in _layers(inputs):
        layer.backend = convolutions
    with mock.patch.dict(MEASURED, clear=True):
        wide, narrow = block_end(inputs.inner, inputs.x, inputs.block, inputs.following)
        if inputs.following is None:
            return [wide]
        return [wide, convolution(wide, inputs.following, relu=True) if narrow is None else narrow]


def ours(inputs: Inputs) -> list[Tensor]:
    """By the kernel; on a CPU by the op's reference."""
    _, middle, last = (layer for layer in inputs.block.convolutions if isinstance(layer, ConvolutionWeights))
    branch = inputs.block.downsample
    weights = middle.laid_out(), last.laid_out(branch)
    following = None if inputs.following is None else inputs.following.laid_out()
    assert weights[0] is not None and weights[1] is not None  # of such channels
    shortcut = (inputs.x, None) if branch is None else (None, inputs.x)
    backend = "native" if inputs.inner.is_cuda else "reference"
    found = kernels.convolution_ending(inputs.inner, *weights, following, *shortcut, backend=backend)
    return [one for one in found if one is not None]


def _checked(x: Tensor) -> Tensor:
    """Some of the images, the first and the last among them."""
    return x[torch.linspace(0, len(x) - 1, min(CHECKED, len(x))).round().long().to(x.device)]


def exact(inputs: Inputs) -> list[Tensor]:
    """In float64, of the images that are held against it and the weights as they are rounded."""

    def layer(x: Tensor, one: ConvolutionWeights) -> Tensor:
        return F.conv2d(x, one.weight.double(), one.float_bias.double(), one.stride, one.padding)

    _, middle, last = (layer for layer in inputs.block.convolutions if isinstance(layer, ConvolutionWeights))
    shortcut, branch = _checked(inputs.x).double(), inputs.block.downsample
    with torch.backends.cudnn.flags(enabled=False):  # whose search in float64 would take longer
        shortcut = shortcut if branch is None else layer(shortcut, branch)
        inner = layer(_checked(inputs.inner).double(), middle).relu()
        wide = (layer(inner, last) + shortcut).relu()
        return [wide] if inputs.following is None else [wide, layer(wide, inputs.following).relu()]


def _ours_on_poisoned_memory(inputs: Inputs) -> list[Tensor]:
    """Fresh memory is NaN, which else may hold another's result."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return ours(inputs)
    finally:
        torch.use_deterministic_algorithms(previous)


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The larger relative L2 distance to float64; NaN where any number of any image is not finite."""
    if not all(bool(one.isfinite().all()) for one in found):
        return float("nan")
    pairs = zip(found, truth, strict=True)
    return max(float((_checked(one).double() - want).norm() / want.norm()) for one, want in pairs)


@torch.no_grad()
def measure(ending: Ending, dtype: torch.dtype, device: torch.device, rounds: int, bandwidth: float | None) -> Measured:
    """Check the contenders, then time those that are right in turn, on sets of inputs that rotate."""
    count = max(2, min(SETS, LARGEST_BYTES // (ending.elements() * dtype.itemsize)))
    sets = [make_inputs(ending, dtype, device, seed) for seed in range(count)]
    truth = exact(sets[0])
    runs: dict[str, Callable[[Inputs], list[Tensor]]] = {
        LIBRARY: functools.partial(others, convolutions=LIBRARY),
        ENGINE: functools.partial(others, convolutions=AUTO),
        ENDING: ours,
    }
    errors = {name: _error(run(sets[0]), truth) for name, run in runs.items() if name != ENDING}
    errors[ENDING] = _error(_ours_on_poisoned_memory(sets[0]), truth)
    note = ""
    if not errors[ENDING] <= (limit := ERROR_FACTOR * errors[LIBRARY]):
        note = f"error {errors[ENDING]:.2e}, {limit:.2e} allowed"
        del runs[ENDING]
    timers = {
        name: Timer([functools.partial(run, sets[call % count]) for call in range(GRAPH_CALLS)], device)
        for name, run in runs.items()
    }
    take_in_turn(list(timers.values()), rounds)
    floors = ending.floors(dtype.itemsize, bandwidth) if bandwidth else None
    return Measured(ending, {name: timer.median for name, timer in timers.items()}, errors, floors, note)


def run(
    batches: Sequence[int], side: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[list[Measured], list[report.Row]]:
    """Measures and prints; what was found, and the rows of the CSV."""
    bandwidth = common.copy_bandwidth(device) if device.type == "cuda" else None
    if bandwidth:
        print(f"bandwidth of a copy {bandwidth / 1e12:.2f} TB/s")
    print(HEADER)
    found = []
    for one in endings(batches, side):
        found.append(measure(one, dtype, device, rounds, bandwidth))
        print(line(found[-1]), flush=True)
    if device.type == "cuda":
        print(f"MEASURED in fastmetro_kernels/convolution/ending_configs.py\n{table_entries(found)}")
    return found, rows(found, dtype)


def line(one: Measured) -> str:
    """One line of the table, and below it why the kernel has no time."""
    time, floors = one.times.get(ENDING), one.floors_us or (None, None)
    cells = ["-" if us is None else f"{us:.1f}" for us in (*floors, one.times[LIBRARY], one.times[ENGINE], time)]
    ratio = f"{one.others_us / time:.2f}" if time else "-"
    share = f"{max(one.floors_us) / time:.0%}" if time and one.floors_us else "-"
    errors = [f"{one.errors[name]:.1e}" for name in (ENDING, LIBRARY)]
    text = LAYOUT.format(str(one.ending), *cells, ratio, share, *errors)
    return f"{text}\n    {one.note}" if one.note else text


def table_entries(found: Sequence[Measured]) -> str:
    """Entries of `MEASURED`, and a comment for each measurement; of what the others keep comments alone."""
    lines = []
    for height, width, mode in dict.fromkeys(one.ending[1:] for one in found):
        mine = sorted((one for one in found if one.ending[1:] == (height, width, mode)), key=lambda one: one.ending)
        faster = list(itertools.takewhile(lambda one: one.is_faster, reversed(mine)))
        for one in mine:
            times = (f"{name} {one.times[name]:.1f}" if name in one.times else f"{name} -" for name in one.errors)
            lines.append(f"    # {one.ending}, us: {', '.join(times)}")
        if faster:
            lines.append(f"    ({height}, {width}, {mode.upper()}): {faster[-1].ending.images},")
    return "\n".join(lines)


def rows(found: Sequence[Measured], dtype: torch.dtype) -> list[report.Row]:
    """One row for each contender."""
    made = []
    for one in found:
        for name, error in one.errors.items():
            time = one.times.get(name)
            row = dict.fromkeys(report.COLUMNS, "") | {"what": str(one.ending), "contender": name}
            row |= {"batch": str(one.ending.images), "dtype": str(dtype).removeprefix("torch.")}
            row |= {"us": f"{time:.4g}" if time else "", "error": f"{error:.3e}"}
            row["library_over_it"] = f"{one.times[LIBRARY] / time:.4g}" if time else ""
            row["note"] = one.note if name == ENDING else ""
            floors = [f"{us:.4g}" for us in one.floors_us] if one.floors_us else ["", ""]
            row["floor_us"] = f"{max(one.floors_us):.4g}" if one.floors_us else ""
            made.append(row | dict(zip(("floor_bytes_us", "floor_flop_us"), floors, strict=True)))
    return made
