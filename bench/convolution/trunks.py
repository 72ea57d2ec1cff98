"""Whole trunks, each one CUDA graph: folded with the library's convolutions, and folded as the engine runs it."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.convolution.measure import Timer, take_in_turn
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.weights import AUTO, LIBRARY
from fastmetro.models.backbones import create_backbone
from fastmetro.profiling.latency import tensor_float_32

CHECKED = 8
"""Images that are held against float32; images do not depend on one another."""
LARGEST_ERROR = 1e-3
GAIN = 0.2


@dataclass(frozen=True)
class Target:
    """What must be shown of a trunk: the library's time over ours, or the milliseconds that ours takes at most."""

    trunk: str
    images: int
    least: float = 0.0
    limit_ms: float = 0.0


TARGETS = (
    Target("resnet50", 1, limit_ms=0.16),
    Target("resnet50", 1, 2.3),
    Target("hrnet-w64", 1, 2.2),
    *(Target("resnet50", images, least) for images, least in ((8, 1.4), (32, 1.15), (256, 1.15))),
)
"""On one H200, float16; beside them the error of ours must be at most `LARGEST_ERROR`."""


@dataclass(frozen=True)
class Outcome:
    """Microseconds and relative L2 errors of a trunk; `ratio` is the median of the rounds', the library's over ours."""

    trunk: str
    images: int
    library_us: float
    ours_us: float
    ratio: float
    library_error: float
    ours_error: float


def make_trunk(trunk: str, images: int, side: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A backbone in float32 with random weights, and images [images, 3, side, side].

    Batch norms are as they are initialised, with gains of 0.2 where residual branches would end in zero: about what
    training makes of them. Statistics of such images would make features alike for all of them, and any error 30 times
    as large.
    """
    torch.manual_seed(0)
    backbone = create_backbone(trunk).to(device).eval().requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.masked_fill_(module.weight == 0, GAIN)
    generator = torch.Generator(device).manual_seed(1)
    return backbone, torch.randn(images, 3, side, side, generator=generator, device=device)


@torch.no_grad()
def compare(trunk: str, images: int, side: int, dtype: torch.dtype, device: torch.device, rounds: int) -> Outcome:
    """Times both in turn, after each was held against the plain float32 trunk without TF32."""
    backbone, pixels = make_trunk(trunk, images, side, device)
    truth = truth_of(backbone, pixels)
    x = pixels.to(dtype, memory_format=torch.channels_last)
    folded = [fold_backbone(backbone, dtype, convolutions) for convolutions in (LIBRARY, AUTO)]
    errors = [trunk_error(one(x), truth) for one in folded]
    timers = [Timer([functools.partial(one, x)], device) for one in folded]
    take_in_turn(timers, rounds)
    library, ours = timers
    ratios = [first / second for first, second in zip(library.samples, ours.samples, strict=True)]
    return Outcome(trunk, images, library.median, ours.median, statistics.median(ratios), *errors)


@torch.no_grad()
def truth_of(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Features of the images that are checked, by the plain trunk in float32 without TF32; as float64."""
    with tensor_float_32(False):
        return backbone(pixels[:CHECKED]).double()


def trunk_error(features: Tensor, truth: Tensor) -> float:
    """Relative L2 distance of the images that are checked; NaN where any feature of any image is not finite."""
    if not bool(features.isfinite().all()):
        return float("nan")
    return float((features[:CHECKED].double() - truth).norm() / truth.norm())


def line(outcome: Outcome) -> str:
    """One line for people."""
    return (
        f"  {outcome.trunk:10} {outcome.images:4} images  library {outcome.library_us:9.1f}  ours "
        f"{outcome.ours_us:9.1f}  ratio {outcome.ratio:5.2f}   error {outcome.ours_error:.2e} "
        f"(library {outcome.library_error:.2e})"
    )


def target_table(outcomes: list[Outcome]) -> str:
    """Targets, what was measured, and whether that is enough."""
    lines = [f"Must show, with an error of at most {LARGEST_ERROR:.0e}"]
    for target in TARGETS:
        asked = f"at most {target.limit_ms:g} ms" if target.limit_ms else f"at least {target.least:g}x"
        found = [one for one in outcomes if (one.trunk, one.images) == (target.trunk, target.images)]
        verdict = _verdict(target, found[0]) if found else "not measured"
        lines.append(f"  {target.trunk:10} {target.images:4} images  {asked:16} {verdict}")
    return "\n".join(lines)


def _verdict(target: Target, outcome: Outcome) -> str:
    if not outcome.ours_error <= LARGEST_ERROR:
        return f"MISSED: error {outcome.ours_error:.2e}"
    value = outcome.ours_us / 1e3 if target.limit_ms else outcome.ratio
    reached = value <= target.limit_ms if target.limit_ms else value >= target.least
    return f"{value:.3g}, {'reached' if reached else 'MISSED'}"
