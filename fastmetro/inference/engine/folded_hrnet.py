"""The folded HRNet-W64, its resolutions side by side on parallel streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fastmetro.inference.engine.batch_norm import (
    batch_norm_fold,
    batch_norm_sizes,
    downsample_bias_fold,
    fold_batch_norm,
)
from fastmetro.inference.engine.convolution import (
    basic_block,
    bottleneck,
    convolution,
    convolution_relu_add,
    double_stem,
    exchange_output,
    residual_chain,
    takes_raw,
)
from fastmetro.inference.engine.exact_pixels import exact_pixel_constants, fold_pixels
from fastmetro.inference.engine.folded_backbone import FoldedBackbone
from fastmetro.inference.engine.report import Fold
from fastmetro.inference.engine.streams import ParallelStreams
from fastmetro.inference.engine.weights import (
    BlockWeights,
    ConvolutionWeights,
    DoubleStemWeights,
    ExchangeWeights,
    convolution_layers,
)
from fastmetro.models.backbones import HRNetW64
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro.models.backbones.hrnet import ExchangeModule


class _Exchange(nn.Module):
    """Weights of one exchange module: blocks of every branch, and what makes every output."""

    def __init__(self, module: ExchangeModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(BlockWeights(cast(BasicBlock, block), dtype) for block in cast(nn.Sequential, branch))
            for branch in module.branches
        )
        self.outputs = nn.ModuleList(ExchangeWeights(cast(nn.ModuleList, paths), dtype) for paths in module.fuse_layers)

    def load(self, module: ExchangeModule) -> None:
        for mine, branch in zip(self.branches, module.branches, strict=True):
            for weights, block in zip(cast(nn.ModuleList, mine), cast(nn.Sequential, branch), strict=True):
                cast(BlockWeights, weights).load(cast(BasicBlock, block))
        for output, paths in zip(self.outputs, module.fuse_layers, strict=True):
            cast(ExchangeWeights, output).load(cast(nn.ModuleList, paths))

    def branch(self, index: int, x: Tensor) -> Tensor:
        """The blocks of one branch."""
        for block in cast(nn.ModuleList, self.branches[index]):
            x = basic_block(x, cast(BlockWeights, block))
        return x

    def output(self, index: int, features: Sequence[Tensor]) -> Tensor:
        """One output of the exchange."""
        return exchange_output(features, cast(ExchangeWeights, self.outputs[index]))


class FoldedHRNet(FoldedBackbone):
    """HRNet-W64; see :class:`FoldedBackbone`. While a CUDA graph is captured its branches are parallel nodes."""

    def __init__(self, backbone: HRNetW64, dtype: torch.dtype) -> None:
        sizes = batch_norm_sizes(backbone)
        folds = [batch_norm_fold(sizes), downsample_bias_fold(sizes), exchange_bias_fold(backbone, sizes)]
        super().__init__(backbone, dtype, folds)
        single = _single_convolutions(backbone)
        self.single = nn.ModuleDict({name: ConvolutionWeights(layer, dtype) for name, (layer, _) in single.items()})
        self.stem = DoubleStemWeights(backbone.conv1, backbone.conv2, dtype)
        self.pixel_stem = DoubleStemWeights(backbone.conv1, backbone.conv2, dtype)
        self.layer1 = nn.ModuleList(BlockWeights(cast(Bottleneck, block), dtype) for block in backbone.layer1)
        self.stages = nn.ModuleList(
            nn.ModuleList(_Exchange(cast(ExchangeModule, module), dtype) for module in stage)
            for stage in (backbone.stage2, backbone.stage3, backbone.stage4)
        )
        self.heads = nn.ModuleList(BlockWeights(block, dtype) for block in _heads(backbone))
        self.streams = ParallelStreams()
        self._load(backbone)

    def _load(self, backbone: nn.Module) -> None:
        source = cast(HRNetW64, backbone)
        for name, (layer, norm) in _single_convolutions(source).items():
            self._single(name).load(*fold_batch_norm(layer, norm))
        first, second = fold_batch_norm(source.conv1, source.bn1), fold_batch_norm(source.conv2, source.bn2)
        self.stem.load(first, second)
        self.pixel_stem.load(fold_pixels(*first, self.dtype), second)
        for mine, block in zip(self.layer1, source.layer1, strict=True):
            cast(BlockWeights, mine).load(cast(Bottleneck, block))
        stages = (source.stage2, source.stage3, source.stage4)
        for modules, stage in zip(self.stages, stages, strict=True):
            for exchange, module in zip(cast(nn.ModuleList, modules), stage, strict=True):
                cast(_Exchange, exchange).load(cast(ExchangeModule, module))
        for mine, block in zip(self.heads, _heads(source), strict=True):
            cast(BlockWeights, mine).load(block)

    def _single(self, name: str) -> ConvolutionWeights:
        return cast(ConvolutionWeights, self.single[name])

    def _relu_convolution(self, x: Tensor, name: str) -> Tensor:
        return convolution(x, self._single(name), relu=True)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features, in channels_last and of the folded type, of images in any layout and floating point type.

        Raises:
            ValueError: the height or width of the images is not a multiple of 32.
        """
        _check_size(*images.shape[-2:])
        prepared = images if takes_raw(images, self.stem) else self._prepare(images)
        return self._behind(double_stem(prepared, self.stem))

    def pixel_constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """So that pixels are exact."""
        return exact_pixel_constants(self.dtype, device)

    @torch.no_grad()
    def of_pixels(self, images: Tensor) -> Tensor:
        """Features of pixels; see :class:`FoldedBackbone`. Errors as of a call."""
        _check_size(*images.shape[-2:])
        return self._behind(double_stem(images, self.pixel_stem))

    @torch.no_grad()
    def of_bytes(self, pixels: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Features of uint8 images; see :class:`FoldedBackbone`. Errors as of a call."""
        if not takes_raw(pixels, self.pixel_stem):
            return super().of_bytes(pixels, mean, scale)
        _check_size(*pixels.shape[1:3])
        return self._behind(double_stem(pixels, self.pixel_stem, mean, scale))

    def _behind(self, x: Tensor) -> Tensor:
        """All that is behind the stem."""
        x = residual_chain(x, cast("list[BlockWeights]", list(self.layer1)))
        features = [self._relu_convolution(x, name) for name in ("transition1_0", "transition1_1")]
        features = self._stage(0, features)
        features = self._stage(1, [*features, self._relu_convolution(features[-1], "transition2")])
        features = self._stage(2, [*features, self._relu_convolution(features[-1], "transition3")])

        heads = [
            partial(bottleneck, feature, cast(BlockWeights, block))
            for feature, block in zip(features, self.heads, strict=True)
        ]
        y, *coarser = self.streams.run(x.device, heads)
        for level, feature in enumerate(coarser):
            y = convolution_relu_add(y, self._single(f"merge_{level}"), feature)
        return self._relu_convolution(y, "final")

    def _stage(self, stage: int, inputs: list[Tensor]) -> list[Tensor]:
        """All exchange modules of a stage. An output and the branch of the next module that it feeds are one piece."""
        modules = [cast(_Exchange, module) for module in cast(nn.ModuleList, self.stages[stage])]
        device, branches = inputs[0].device, range(len(inputs))
        features = self.streams.run(device, [partial(modules[0].branch, i, inputs[i]) for i in branches])
        for module, following in pairwise(modules):
            features = self.streams.run(device, [partial(_cross, module, following, i, features) for i in branches])
        return self.streams.run(device, [partial(modules[-1].output, i, features) for i in branches])


def _check_size(height: int, width: int) -> None:
    if height % 32 or width % 32:
        raise ValueError(f"images must have a height and width that are multiples of 32, got {height} x {width}")


def _cross(module: _Exchange, following: _Exchange, index: int, features: Sequence[Tensor]) -> Tensor:
    return following.branch(index, module.output(index, features))


def _heads(backbone: HRNetW64) -> list[Bottleneck]:
    return [cast(Bottleneck, cast(nn.Sequential, stage)[0]) for stage in backbone.incre_modules]


def _single_convolutions(backbone: HRNetW64) -> dict[str, tuple[nn.Conv2d, nn.Module]]:
    """The convolutions outside the stem, blocks and exchanges, all with a ReLU: each with its batch norm."""
    paths: dict[str, nn.Module] = {
        "transition1_0": backbone.transition1[0],
        "transition1_1": backbone.transition1[1],
        "transition2": backbone.transition2[-1],
        "transition3": backbone.transition3[-1],
        **{f"merge_{level}": path for level, path in enumerate(backbone.downsamp_modules)},
        "final": backbone.final_layer,
    }
    return {name: convolution_layers(path)[0] for name, path in paths.items()}


def exchange_bias_fold(backbone: HRNetW64, sizes: dict[str, int]) -> Fold:
    """What adding one bias instead of one per term saves in the exchanges: an addition per element of the others.

    Args:
        backbone: the backbone that ``sizes`` were taken of.
        sizes: as of :func:`fastmetro.inference.engine.batch_norm.batch_norm_sizes`.
    """
    names = {module: name for name, module in backbone.named_modules()}
    saved = count = 0
    for module in backbone.modules():
        if not isinstance(module, ExchangeModule):
            continue
        for target, paths in enumerate(module.fuse_layers):
            terms = [
                0 if path is None else sizes[names[convolution_layers(path)[-1][1]]]
                for path in cast(nn.ModuleList, paths)
            ]
            kept = terms[target - 1] if target else terms[-1]
            saved += sum(terms) - kept
            count += 1
    return Fold("exchange bias", f"{count} exchange outputs add one bias for all their terms", saved)
