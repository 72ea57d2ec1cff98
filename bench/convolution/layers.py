"""The convolutions of the engine's trunks: recorded from the folded backbones, which run on shapes alone."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.models.backbones import create_backbone
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution import ConvolutionWeights, reference
from fastmetro_kernels.convolution.api import layer_of
from fastmetro_kernels.convolution.pair import pair_layer
from fastmetro_kernels.convolution.table import Layer

TRUNKS = ("resnet50", "hrnet-w64")
FLOP_PER_SECOND = 989e12
"""Half-precision products of an H100 and an H200, dense, by their data sheet."""


class Used(NamedTuple):
    """A layer as a trunk uses it.

    Attributes:
        layer: what the kernel is chosen by.
        residual, relu: what is behind the sums.
        place: height, width and stride of the second input, zeros without one.
        late: whether the residual is behind the ReLU.
    """

    layer: Layer
    residual: bool
    relu: bool
    place: tuple[int, int, int] = (0, 0, 0)
    late: bool = False

    def __str__(self) -> str:
        residual = ", residual behind" if self.late else ", residual" if self.residual else ""
        return f"{self.layer}{residual}{'' if self.relu else ', no ReLU'}"

    def separate(self) -> tuple[Used, Used]:
        """The two layers that take the place of one with a second input."""
        layer, (height, width, stride) = self.layer, self.place
        branch = Layer(layer.images, height, width, layer.second, layer.outputs, 1, 1, stride, 0)
        return Used(branch, False, False), Used(layer._replace(second=0), True, self.relu)

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = self.layer.output
        return height * self.layer.scale, width * self.layer.scale

    def flop(self) -> int:
        """Two for each multiply-add."""
        layer = self.layer
        depth = layer.down * layer.across * layer.channels + layer.second
        return 2 * layer.shape.rows * layer.outputs * depth

    def elements(self) -> int:
        """Numbers that have to be read or written once; pixels between those of a stride are not read."""
        layer, rows = self.layer, self.layer.shape.rows
        taps = layer.down * layer.across
        pixels = min(layer.images * layer.height * layer.width, rows * taps) * layer.channels
        weights = layer.outputs * (taps * layer.channels + layer.second)
        results = rows * layer.scale**2 * layer.outputs
        return pixels + rows * layer.second + weights + results * (1 + self.residual)

    def floor(self, element_size: int, bytes_per_second: float) -> float:
        """Seconds that moving the bytes or multiplying takes at least."""
        return max(self.elements() * element_size / bytes_per_second, self.flop() / FLOP_PER_SECOND)


def _run_on_shapes(trunk: str, images: int, side: int, convolution: Any, pair: Any) -> None:
    """The trunk, with these in the place of the kernel's ops."""
    with torch.device("meta"):
        backbone = create_backbone(trunk)
    folded = fold_backbone(backbone, torch.float16, convolutions="reference")
    with mock.patch.multiple(kernels, convolution=convolution, convolution_pair=pair):
        folded(torch.empty(images, 3, side, side, dtype=torch.float16, device="meta"))


def used_pairs(trunk: str, images: int, side: int) -> Counter[Layer]:
    """How often a trunk runs each pair of layers that may be one kernel."""
    found: Counter[Layer] = Counter()

    def pair(x: Tensor, weights: ConvolutionWeights, following: ConvolutionWeights, **options: Any) -> Any:
        found[pair_layer(x, weights, following, options["residual"], options["second"])] += 1
        wide = reference.convolution(x, weights, options["residual"], options["second"], True)
        return wide, reference.convolution(wide, following, None, None, True)

    _run_on_shapes(trunk, images, side, kernels.convolution, pair)
    return found


def used_layers(trunk: str, images: int, side: int) -> Counter[Used]:
    """How often a trunk runs each of its layers that the kernel can take, for so many images of side x side pixels.

    A layer with a second input is followed by the two that take its place where the library is faster, with no uses.
    """
    found: Counter[Used] = Counter()

    def record(
        x: Tensor,
        weights: ConvolutionWeights,
        *,
        residual: Tensor | None,
        second: Tensor | None,
        relu: bool,
        backend: str,
        late: bool = False,
        scale: int = 1,
    ) -> Tensor:
        place = (0, 0, 0) if second is None else (second.shape[2], second.shape[3], weights.second_stride)
        one = Used(layer_of(x, weights, residual, second, scale), residual is not None, relu, place, late)
        found[one] += 1
        for other in one.separate() if second is not None else ():
            found[other] += 0
        return reference.convolution(x, weights, residual, second, relu, scale, late)

    def pair(x: Tensor, weights: ConvolutionWeights, following: ConvolutionWeights, **options: Any) -> Any:
        wide = record(x, weights, relu=True, **options)
        return wide, record(wide, following, residual=None, second=None, relu=True, backend=options["backend"])

    _run_on_shapes(trunk, images, side, record, pair)
    return found
