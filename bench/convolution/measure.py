"""Times and errors of one layer: the library, cuBLASLt where the layer is a plain product, and the kernel by its tiles.

Calls of a graph rotate over sets of inputs and weights, as in the engine, where the layers in between have been through
the caches. Every result is held against float64 before it is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from bench.convolution.layers import Used
from fastmetro.inference.engine.convolution import convolution, convolution_relu_add, repeated_convolution
from fastmetro.inference.engine.weights import LIBRARY, ConvolutionWeights
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution import ConvolutionConfig

SETS = 16
LARGEST_BYTES = 1 << 30
"""Of all sets together: large batches get fewer sets, at least two, which are beyond the caches all the same."""
GRAPH_CALLS = 16

Call = Callable[[], object]


class Inputs(NamedTuple):
    """Of one call; images [N, C, H, W] in channels_last."""

    x: Tensor
    residual: Tensor | None
    second: Tensor | None
    weights: ConvolutionWeights
    projection: ConvolutionWeights | None


def _weights(layer: nn.Conv2d, dtype: torch.dtype, generator: torch.Generator) -> ConvolutionWeights:
    found = ConvolutionWeights(layer, dtype, bias=layer.bias is not None)
    device, (outputs, *depth) = layer.weight.device, layer.weight.shape
    scale = torch.Size(depth).numel() ** -0.5
    weight = torch.randn(layer.weight.shape, generator=generator, device=device) * scale
    # Rounded once for all, so that nobody's bias is more exact than another's.
    bias = torch.randn(outputs, generator=generator, device=device).to(dtype).float()
    found.load(weight, bias if layer.bias is not None else None)
    found.backend = LIBRARY
    return found


def make_inputs(used: Used, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs and weights of a layer, its results about 1 in size."""
    layer, (height, width, stride) = used.layer, used.place
    generator = torch.Generator(device).manual_seed(seed)

    def images(channels: int, *size: int) -> Tensor:
        made = torch.randn(layer.images, channels, *size, generator=generator, device=device)
        return made.to(dtype).contiguous(memory_format=torch.channels_last)

    kernel, options = (layer.down, layer.across), {"stride": layer.stride, "padding": layer.padding, "device": device}
    first = nn.Conv2d(layer.channels, layer.outputs, kernel, bias=used.relu or used.residual, **options)
    second = projection = None
    if layer.second:
        second = images(layer.second, height, width)
        branch = nn.Conv2d(layer.second, layer.outputs, 1, stride=stride, bias=False, device=device)
        projection = _weights(branch, dtype, generator)
    residual = images(layer.outputs, *used.out) if used.residual else None
    x = images(layer.channels, layer.height, layer.width)
    return Inputs(x, residual, second, _weights(first, dtype, generator), projection)


@dataclass(eq=False)
class Case:
    """A layer with its inputs, and who computes it.

    Args:
        used: the layer.
        dtype: of everything; float32 on a CPU.
        device: where; on a CPU the kernel's op runs on its reference.
    """

    used: Used
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        bytes_of_a_set = self.used.elements() * self.dtype.itemsize
        count = max(2, min(SETS, LARGEST_BYTES // bytes_of_a_set))
        self.sets = [make_inputs(self.used, self.dtype, self.device, seed) for seed in range(count)]
        self.exact = _exact(self.used, self.sets[0])

    def library(self, inputs: Inputs) -> Tensor:
        """cuDNN's fused calls as the engine makes them (oneDNN's on a CPU)."""
        residual = inputs.residual
        if self.used.layer.scale > 1 and residual is not None:
            return repeated_convolution(inputs.x, inputs.weights, residual, self.used.relu)
        if inputs.second is not None and inputs.projection is not None:
            residual = convolution(inputs.second, inputs.projection)
        if self.used.late and residual is not None:
            return convolution_relu_add(inputs.x, inputs.weights, residual)
        return convolution(inputs.x, inputs.weights, self.used.relu, residual)

    def product(self, inputs: Inputs) -> Tensor:
        """A 1 x 1 convolution as a product of matrices: cuBLASLt with bias and ReLU, as far as PyTorch offers them."""
        layer, relu = self.used.layer, self.used.relu
        rows = inputs.x.permute(0, 2, 3, 1).reshape(-1, layer.channels)
        weight, bias = inputs.weights.weight.flatten(1).t(), inputs.weights.bias
        if bias is None:
            y = rows @ weight
        elif relu and inputs.residual is None:
            y = torch._addmm_activation(bias, rows, weight)
        else:
            y = torch.addmm(bias, rows, weight)
            if inputs.residual is not None:
                y.add_(inputs.residual.permute(0, 2, 3, 1).reshape(-1, layer.outputs))
            if relu:
                y.relu_()
        return y.view(layer.images, *layer.output, layer.outputs).permute(0, 3, 1, 2)

    @property
    def is_product(self) -> bool:
        """Whether `product` can compute it."""
        layer = self.used.layer
        plain = (layer.down, layer.across, layer.stride, layer.second, layer.scale) == (1, 1, 1, 0, 1)
        return plain and not self.used.late

    def ours(self, inputs: Inputs, config: ConvolutionConfig) -> Tensor:
        """The kernel with this tile; on a CPU the op's reference."""
        laid_out = inputs.weights.laid_out(inputs.projection)
        assert laid_out is not None  # only such layers are recorded
        return kernels.convolution(
            inputs.x, laid_out, residual=inputs.residual, second=inputs.second, relu=self.used.relu,
            late=self.used.late, scale=self.used.layer.scale, config=config,
            backend="native" if self.device.type == "cuda" else "reference",
        )  # fmt: skip

    def error(self, got: Tensor) -> float:
        """Relative L2 distance to float64, of the first and the last image."""
        return float((_ends(got).double() - self.exact).norm() / self.exact.norm())

    def calls(self, run: Callable[[Inputs], Tensor], count: int = GRAPH_CALLS) -> list[Call]:
        """So many calls on rotating inputs."""
        chosen = [self.sets[index % len(self.sets)] for index in range(count)]
        return [lambda inputs=inputs: run(inputs) for inputs in chosen]


def _ends(x: Tensor) -> Tensor:
    return x[[0, -1]] if len(x) > 1 else x


def _exact(used: Used, inputs: Inputs) -> Tensor:
    """Of the first and the last image, float64."""
    weights, projection = inputs.weights, inputs.projection
    bias = None if weights.bias is None else weights.bias.double()
    with torch.backends.cudnn.flags(enabled=False):  # whose search in float64 would take longer than the product
        y = F.conv2d(_ends(inputs.x).double(), weights.weight.double(), bias, weights.stride, weights.padding)
        if inputs.second is not None and projection is not None:
            y += F.conv2d(_ends(inputs.second).double(), projection.weight.double(), None, projection.stride)
    if (scale := used.layer.scale) > 1:
        y = y.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    if used.late:
        y.relu_()
    if inputs.residual is not None:
        y += _ends(inputs.residual).double()
    return y.relu() if used.relu and not used.late else y


class Timer:
    """Microseconds of one of several calls: of a CUDA graph of them, or by the clock on a CPU."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls, self._device = calls, device
        calls[0]()  # chooses algorithms, loads kernels
        self._graph = common.capture(calls, keep=2) if device.type == "cuda" else None
        self.samples: list[float] = []

    def take(self) -> float:
        """One more sample."""
        if self._graph is not None:
            taken = self._graph.milliseconds()
        else:
            taken = common.milliseconds(lambda: [call() for call in self._calls], self._device) / len(self._calls)
        self.samples.append(1e3 * taken)
        return self.samples[-1]

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)


def take_in_turn(timers: Sequence[Timer], rounds: int) -> None:
    """So many samples of each, in turn, so that drifting clocks hit all alike."""
    for _ in range(rounds):
        for timer in timers:
            timer.take()
