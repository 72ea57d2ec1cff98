"""`python -m bench convolution --only stems`: the beginnings of the trunks, which are a kernel each.

ResNet's is a 7 x 7 convolution of stride 2 and 3 x 3 max pooling, HRNet's two 3 x 3 convolutions of stride 2. The
library takes them one after the other. Images rotate over several sets; results are held against float64.

Images as they come, float32 planes and pixels of 8 bits, are given to the kernel itself and, for comparison, to the
kernel that makes images of the stem's type of them in front of it: both must give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.convolution.layers import FLOP_PER_SECOND
from bench.convolution.measure import GRAPH_CALLS, Timer, take_in_turn
from bench.convolution.report import COLUMNS, LIBRARY, OURS, Row
from bench.convolution.trunks import make_trunk
from bench.convolution.tune import ERROR_FACTOR
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.convolution import double_stem, stem
from fastmetro.inference.engine.folded_backbone import FoldedBackbone
from fastmetro.inference.engine.folded_hrnet import FoldedHRNet
from fastmetro.inference.engine.folded_resnet import FoldedResNet
from fastmetro.inference.engine.weights import AUTO, DoubleStemWeights, StemWeights
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.fused import normalize_pixels, to_channels_last

SETS = 4
FLOP_PER_IMAGE = {"resnet50": 2 * 112**2 * 64 * 147, "hrnet-w64": 2 * 64 * (112**2 * 27 + 56**2 * 576)}
"""Of images of 224 x 224."""


FRONTS = {"float32": "to_channels_last", "pixels": "normalize_pixels"}
"""The kernel in front of the stem, of images as they come."""


@dataclass(frozen=True)
class Raw:
    """Images as they come: microseconds of two kernels and of one, and the relative L2 error of the one.

    Attributes:
        equal: whether both give the same bits.
    """

    kind: str
    two_us: float
    ours_us: float
    error: float
    equal: bool


@dataclass(frozen=True)
class Stem:
    """Microseconds and relative L2 errors of the library and of ours; the floor is None on a CPU."""

    trunk: str
    images: int
    library_us: float
    ours_us: float
    library_error: float
    ours_error: float
    floor_us: float | None
    raw: tuple[Raw, ...] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether ours is off by more than twice as much as the library, or two kernels and one differ."""
        errors = [self.ours_error, *(one.error for one in self.raw)]
        allowed = ERROR_FACTOR * self.library_error
        return not (all(error <= allowed for error in errors) and all(one.equal for one in self.raw))


@torch.no_grad()
def compare(
    trunk: str, images: int, side: int, dtype: torch.dtype, device: torch.device, rounds: int, bandwidth: float | None
) -> Stem:
    """Times both in turn."""
    backbone, pixels = make_trunk(trunk, images, side, device)
    sets = [(pixels + number).to(dtype, memory_format=torch.channels_last) for number in range(SETS)]
    folded = [fold_backbone(backbone, dtype, convolutions) for convolutions in (LIBRARY, AUTO)]
    truth = _exact(_weights(folded[0]), sets[0][:1])
    outputs = [_begin(one, sets[0]) for one in folded]
    errors = [float((got[:1].double() - truth).norm() / truth.norm()) for got in outputs]
    timers = [
        Timer([functools.partial(_begin, one, sets[call % SETS]) for call in range(GRAPH_CALLS)], device)
        for one in folded
    ]
    take_in_turn(timers, rounds)
    floor = None
    if bandwidth:
        moved = (sets[0].numel() + outputs[0].numel()) * dtype.itemsize / bandwidth
        floor = 1e6 * max(moved, images * FLOP_PER_IMAGE[trunk] * (side / 224) ** 2 / FLOP_PER_SECOND)
    raw = tuple(_compare_raw(kind, folded[1], pixels, dtype, rounds) for kind in FRONTS)
    return Stem(trunk, images, *(timer.median for timer in timers), *errors, floor, raw)


def _compare_raw(kind: str, folded: FoldedBackbone, images: Tensor, dtype: torch.dtype, rounds: int) -> Raw:
    """Times the kernel for images as they come, and two kernels, in turn."""
    constants: tuple[Tensor, ...] = ()
    weights, sets = _weights(folded), [images + number for number in range(SETS)]
    if kind == "pixels":
        constants, weights = folded.pixel_constants(images.device), _weights(folded, of_pixels=True)
        sets = [(64 * one + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous() for one in sets]

    def made(x: Tensor) -> Tensor:
        return normalize_pixels(x, *constants, dtype) if constants else to_channels_last(x, dtype)

    def two(x: Tensor) -> Tensor:
        return _kernel(made(x), weights)

    def one(x: Tensor) -> Tensor:
        return _kernel(x, weights, *constants)

    timers = [
        Timer([functools.partial(run, sets[call % SETS]) for call in range(GRAPH_CALLS)], images.device)
        for run in (two, one)
    ]
    expected, got = two(sets[0]), one(sets[0])
    truth = _exact(weights, made(sets[0])[:1])
    error = float((got[:1].double() - truth).norm() / truth.norm())
    take_in_turn(timers, rounds)
    return Raw(kind, *(timer.median for timer in timers), error, torch.equal(got, expected))


def _kernel(x: Tensor, weights: StemWeights | DoubleStemWeights, *constants: Tensor) -> Tensor:
    """The op of `fastmetro_kernels`, whatever the engine would take."""
    mean, scale = constants or (None, None)
    if isinstance(weights, StemWeights):
        laid_out = weights.laid_out_stem()
        assert laid_out is not None
        return kernels.convolution_stem(x, laid_out, mean=mean, scale=scale)
    both = weights.laid_out()
    assert both is not None
    return kernels.convolution_double_stem(x, both, mean=mean, scale=scale)


def _weights(folded: FoldedBackbone, of_pixels: bool = False) -> StemWeights | DoubleStemWeights:
    assert isinstance(folded, FoldedResNet | FoldedHRNet)
    return folded.pixel_stem if of_pixels else folded.stem


def _begin(folded: FoldedBackbone, x: Tensor) -> Tensor:
    weights = _weights(folded)
    return stem(x, weights) if isinstance(weights, StemWeights) else double_stem(x, weights)


def _exact(weights: StemWeights | DoubleStemWeights, x: Tensor) -> Tensor:
    """In float64, of the weights as they are rounded."""
    with torch.backends.cudnn.flags(enabled=False):
        if isinstance(weights, StemWeights):
            y = F.conv2d(x.double(), weights.weight.double(), weights.float_bias.double(), 2, 3).relu()
            return F.max_pool2d(y, 3, 2, 1)
        y = x.double()
        for one in (weights.first, weights.second):
            y = F.conv2d(y, one.weight.double(), one.float_bias.double(), 2, 1).relu()
        return y


def lines(one: Stem) -> str:
    """For people: one line, and one for each kind of images as they come."""
    floor = "-" if one.floor_us is None else f"{one.floor_us:.1f}"
    first = (
        f"  {one.trunk:10} {one.images:4} images  floor {floor:>6}  library {one.library_us:8.1f}  ours "
        f"{one.ours_us:8.1f}  ratio {one.library_us / one.ours_us:5.2f}   error {one.ours_error:.2e} "
        f"(library {one.library_error:.2e}){'  WRONG' if one.is_wrong else ''}"
    )
    others = (
        f"    of {raw.kind}: {FRONTS[raw.kind]} and ours {raw.two_us:.1f}  ours {raw.ours_us:.1f}  ratio "
        f"{raw.two_us / raw.ours_us:5.2f}   error {raw.error:.2e}  {'same bits' if raw.equal else 'OTHER BITS'}"
        for raw in one.raw
    )
    return "\n".join((first, *others))


def rows(found: Iterable[Stem], dtype: torch.dtype) -> list[Row]:
    """Rows of the CSV: two for each, and two for each kind of images as they come."""
    made = []
    for one in found:
        contenders: list[tuple[str, float, float]] = [
            (LIBRARY, one.library_us, one.library_error),
            (OURS, one.ours_us, one.ours_error),
        ]
        for raw in one.raw:
            contenders.append((f"{FRONTS[raw.kind]}, {OURS}", raw.two_us, raw.error))
            contenders.append((f"{OURS}, of {raw.kind}", raw.ours_us, raw.error))
        for name, time, error in contenders:
            row = dict.fromkeys(COLUMNS, "") | {"what": "stem", "trunk": one.trunk, "batch": str(one.images)}
            row |= {"dtype": str(dtype).removeprefix("torch."), "contender": name, "us": f"{time:.4g}"}
            row["floor_us"] = "" if one.floor_us is None else f"{one.floor_us:.4g}"
            # The library's time is without the kernel in front, which images as they come need.
            ratio = f"{one.library_us / time:.4g}" if name in (LIBRARY, OURS) else ""
            made.append(row | {"library_over_it": ratio, "error": f"{error:.3e}"})
    return made
