"""`python -m bench convolution --only stems`: the beginnings of the trunks, which are a kernel each.

ResNet's is a 7 x 7 convolution of stride 2 and 3 x 3 max pooling, HRNet's two 3 x 3 convolutions of stride 2. The
library takes them one after the other. Images rotate over several sets; results are held against float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
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
from fastmetro.inference.engine.weights import AUTO

SETS = 4
FLOP_PER_IMAGE = {"resnet50": 2 * 112**2 * 64 * 147, "hrnet-w64": 2 * 64 * (112**2 * 27 + 56**2 * 576)}
"""Of images of 224 x 224."""


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

    @property
    def is_wrong(self) -> bool:
        """Whether ours is off by more than twice as much as the library."""
        return not self.ours_error <= ERROR_FACTOR * self.library_error


@torch.no_grad()
def compare(
    trunk: str, images: int, side: int, dtype: torch.dtype, device: torch.device, rounds: int, bandwidth: float | None
) -> Stem:
    """Times both in turn."""
    backbone, pixels = make_trunk(trunk, images, side, device)
    sets = [(pixels + number).to(dtype, memory_format=torch.channels_last) for number in range(SETS)]
    folded = [fold_backbone(backbone, dtype, convolutions) for convolutions in (LIBRARY, AUTO)]
    truth = _exact(folded[0], sets[0][:1])
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
    return Stem(trunk, images, *(timer.median for timer in timers), *errors, floor)


def _begin(folded: FoldedBackbone, x: Tensor) -> Tensor:
    if isinstance(folded, FoldedResNet):
        return stem(x, folded.stem)
    assert isinstance(folded, FoldedHRNet)
    return double_stem(x, folded.stem)


def _exact(folded: FoldedBackbone, x: Tensor) -> Tensor:
    """In float64, of the weights as they are rounded."""
    with torch.backends.cudnn.flags(enabled=False):
        if isinstance(folded, FoldedResNet):
            weights = folded.stem
            y = F.conv2d(x.double(), weights.weight.double(), weights.float_bias.double(), 2, 3).relu()
            return F.max_pool2d(y, 3, 2, 1)
        assert isinstance(folded, FoldedHRNet)
        y = x.double()
        for one in (folded.stem.first, folded.stem.second):
            y = F.conv2d(y, one.weight.double(), one.float_bias.double(), 2, 1).relu()
        return y


def line(one: Stem) -> str:
    """One line for people."""
    floor = "-" if one.floor_us is None else f"{one.floor_us:.1f}"
    return (
        f"  {one.trunk:10} {one.images:4} images  floor {floor:>6}  library {one.library_us:8.1f}  ours "
        f"{one.ours_us:8.1f}  ratio {one.library_us / one.ours_us:5.2f}   error {one.ours_error:.2e} "
        f"(library {one.library_error:.2e}){'  WRONG' if one.is_wrong else ''}"
    )


def rows(found: Iterable[Stem], dtype: torch.dtype) -> list[Row]:
    """Two rows of the CSV for each."""
    made = []
    for one in found:
        contenders: Sequence[tuple[str, float, float]] = (
            (LIBRARY, one.library_us, one.library_error),
            (OURS, one.ours_us, one.ours_error),
        )
        for name, time, error in contenders:
            row = dict.fromkeys(COLUMNS, "") | {"what": "stem", "trunk": one.trunk, "batch": str(one.images)}
            row |= {"dtype": str(dtype).removeprefix("torch."), "contender": name, "us": f"{time:.4g}"}
            row["floor_us"] = "" if one.floor_us is None else f"{one.floor_us:.4g}"
            made.append(row | {"library_over_it": f"{one.library_us / time:.4g}", "error": f"{error:.3e}"})
    return made
