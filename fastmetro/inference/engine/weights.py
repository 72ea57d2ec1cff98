"""Folded weights of the backbones' blocks, as the functions of ``convolution.py`` take them.

Every class takes its shapes from a module of ``fastmetro.models.backbones`` when it is made and its weights by
``load``, again and again if need be: buffers keep their memory, so that captured graphs see new weights.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fastmetro.inference.engine.batch_norm import fold_batch_norm
from fastmetro.inference.engine.onednn import WeightPacks
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution import layout

AUTO, LIBRARY = "auto", "library"
CONVOLUTIONS = (AUTO, LIBRARY, "native", "reference")
"""Who computes the convolutions: by measurement this project's kernel or the library; the library alone; or, wherever
the kernel's weights can be laid out, a backend of the kernel's op by name."""


class ConvolutionWeights(nn.Module):
    """One convolution: weight [O, I, h, w] in channels_last, bias [O] or None, stride and padding.

    The kernel takes its bias in float32, so it is kept in that type, too: `float_bias` [O], zeros where there is none.

    Args:
        convolution: the convolution whose shape and device this one has.
        dtype: of the buffers.
        bias: whether it has a bias.

    Raises:
        ValueError: the convolution is grouped, dilated or not padded with zeros.
    """

    weight: Tensor
    bias: Tensor | None
    float_bias: Tensor

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        plain = (1, (1, 1), "zeros")
        given = (convolution.groups, tuple(convolution.dilation), convolution.padding_mode)
        if given != plain or isinstance(convolution.padding, str):
            raise ValueError(
                f"convolution must have 1 group, no dilation and a width of zero padding, got {convolution}"
            )
        self.stride = cast("tuple[int, int]", tuple(convolution.stride))
        self.padding = cast("tuple[int, int]", tuple(convolution.padding))
        like = convolution.weight
        weight = torch.zeros(like.shape, dtype=dtype, device=like.device).to(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(like.shape[0], dtype=dtype, device=like.device) if bias else None)
        self.register_buffer("float_bias", torch.zeros(like.shape[0], device=like.device))
        self.packs = WeightPacks()
        self.backend = AUTO

    def laid_out(self, second: ConvolutionWeights | None = None) -> kernels.ConvolutionWeights | None:
        """As the kernel reads them, in the memory of the buffers; None where it cannot take such a convolution.

        Made at every call, because buffers may be moved or copied; it costs views, and only while a graph is captured.

        Args:
            second: a 1 x 1 convolution of another input to the same channels, whose result is added and which has no
                bias of its own.
        """
        for one in (self,) if second is None else (self, second):
            if one.stride[0] != one.stride[1] or one.padding[0] != one.padding[1]:
                return None
            if layout.problem(one.weight, one.stride[0], one.padding[0]) is not None:
                return None
        more = None if second is None else (second.weight, None, second.stride[0])
        return kernels.lay_out(self.weight, self.float_bias, self.stride[0], self.padding[0], more)

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy weight [O, I, h, w] and bias [O], rounding them to the buffers' type."""
        self.packs.clear()
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
            self.float_bias.copy_(bias)


class StemWeights(ConvolutionWeights):
    """ResNet's first convolution; where it is 7 x 7 of 3 to 64 channels also as the kernel for the stem reads it.

    Args: as of :class:`ConvolutionWeights`.
    """

    packed: Tensor | None

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(convolution, dtype)
        given = (tuple(self.weight.shape), self.stride, self.padding)
        fits = given == ((64, 3, 7, 7), (2, 2), (3, 3))
        self.register_buffer("packed", kernels.pack_stem(self.weight) if fits else None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffers."""
        return self.weight.dtype

    @property
    def fits(self) -> bool:
        """Whether it is such a convolution."""
        return self.packed is not None

    def laid_out_stem(self) -> kernels.StemWeights | None:
        """In the memory of the buffers; None where it is no such convolution."""
        if self.packed is None:
            return None
        return kernels.StemWeights(self.weight, self.float_bias.float(), self.packed)

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """See :class:`ConvolutionWeights`."""
        super().load(weight, bias)
        if self.packed is not None:
            self.packed.copy_(kernels.pack_stem(self.weight))


class DoubleStemWeights(nn.Module):
    """HRNet's first two convolutions; where they are 3 x 3 of stride 2 to 64 channels also as the kernel reads them.

    Args:
        first, second: the convolutions whose shapes and device these have.
        dtype: of the buffers.
    """

    packed_first: Tensor | None
    packed_second: Tensor | None

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = ConvolutionWeights(first, dtype), ConvolutionWeights(second, dtype)
        both = (self.first, self.second)
        shapes = [tuple(one.weight.shape) for one in both]
        steps = {(one.stride, one.padding) for one in both}
        fits = shapes == [(64, 3, 3, 3), (64, 64, 3, 3)] and steps == {((2, 2), (1, 1))}
        packed = kernels.pack_double_stem(self.first.weight, self.second.weight) if fits else (None, None)
        self.register_buffer("packed_first", packed[0])
        self.register_buffer("packed_second", packed[1])

    @property
    def backend(self) -> str:
        """Of both convolutions."""
        return self.first.backend

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffers."""
        return self.first.weight.dtype

    @property
    def fits(self) -> bool:
        """Whether they are such convolutions."""
        return self.packed_first is not None

    def laid_out(self) -> kernels.DoubleStemWeights | None:
        """In the memory of the buffers; None where they are no such convolutions."""
        if self.packed_first is None or self.packed_second is None:
            return None
        biases = (self.first.float_bias.float(), self.second.float_bias.float())
        return kernels.DoubleStemWeights(
            self.first.weight, biases[0], self.second.weight, biases[1], self.packed_first, self.packed_second
        )

    def load(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        """Copy weight and bias of each; see :class:`ConvolutionWeights`."""
        self.first.load(*first)
        self.second.load(*second)
        if self.packed_first is not None and self.packed_second is not None:
            packed = kernels.pack_double_stem(self.first.weight, self.second.weight)
            self.packed_first.copy_(packed[0])
            self.packed_second.copy_(packed[1])


class BlockWeights(nn.Module):
    """A residual block: its 2 or 3 convolutions, and the 1 x 1 convolution of its downsample branch, which has no bias.

    Args:
        block: where the shapes come from.
        dtype: of the buffers.
    """

    downsample: ConvolutionWeights | None

    def __init__(self, block: BasicBlock | Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(ConvolutionWeights(layer, dtype) for layer, _ in _block_layers(block))
        self.downsample = None
        if block.downsample is not None:
            self.downsample = ConvolutionWeights(cast(nn.Conv2d, block.downsample[0]), dtype, bias=False)

    def load(self, block: BasicBlock | Bottleneck) -> None:
        """Fold the block's weights into the buffers."""
        folded = [fold_batch_norm(layer, norm) for layer, norm in _block_layers(block)]
        if self.downsample is not None:
            projection = cast(nn.Sequential, block.downsample)
            weight, bias = fold_batch_norm(cast(nn.Conv2d, projection[0]), projection[1])
            self.downsample.load(weight, None)
            folded[-1] = folded[-1][0], folded[-1][1] + bias
        for mine, (weight, bias) in zip(self.convolutions, folded, strict=True):
            cast(ConvolutionWeights, mine).load(weight, bias)


def _block_layers(block: BasicBlock | Bottleneck) -> list[tuple[nn.Conv2d, nn.Module]]:
    layers: list[tuple[nn.Conv2d, nn.Module]] = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        layers.append((block.conv3, block.bn3))
    return layers


def convolution_layers(path: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    """The convolutions of a path, in order, each with the batch norm behind it."""
    layers = [layer for layer in path.modules() if not isinstance(layer, (nn.Sequential, nn.ReLU, nn.Upsample))]
    pairs = list(pairwise(layers))[::2]
    return [(cast(nn.Conv2d, convolution), norm) for convolution, norm in pairs]


class ExchangeWeights(nn.Module):
    """What makes one output of HRNet's exchange: the paths that bring every other branch to the target's resolution.

    The last convolution of a path has no ReLU and its bias is only ever added to the other terms, so the biases of all
    terms are one vector. It sits where adding it is free or cheapest: in the last convolution of the path from the
    next finer branch, which adds all other terms too, or for the finest target in the path from the coarsest branch.

    Args:
        paths: one module per branch, None for the target itself.
        dtype: of the buffers.
    """

    def __init__(self, paths: nn.ModuleList, dtype: torch.dtype) -> None:
        super().__init__()
        layers = _exchange_layers(paths)
        self.target = layers.index([])
        self.bias_holder = self.target - 1 if self.target else len(layers) - 1
        self.paths = nn.ModuleList(
            nn.ModuleList(
                ConvolutionWeights(layer, dtype, bias=layer is not path[-1][0] or source == self.bias_holder)
                for layer, _ in path
            )
            for source, path in enumerate(layers)
        )

    def load(self, paths: nn.ModuleList) -> None:
        """Fold the paths' weights into the buffers."""
        folded = [[fold_batch_norm(*layer) for layer in path] for path in _exchange_layers(paths)]
        total = torch.stack([path[-1][1] for path in folded if path]).sum(0)
        weight, _ = folded[self.bias_holder][-1]
        folded[self.bias_holder][-1] = weight, total
        for mine, path in zip(self.paths, folded, strict=True):
            for convolution, (weight, bias) in zip(cast(nn.ModuleList, mine), path, strict=True):
                cast(ConvolutionWeights, convolution).load(weight, bias)


def _exchange_layers(paths: nn.ModuleList) -> list[list[tuple[nn.Conv2d, nn.Module]]]:
    return [[] if path is None else convolution_layers(path) for path in paths]
