"""The folded trunks that are a stem and a run of residual blocks: ResNet-50 and the compact trunk."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastmetro.inference.engine.batch_norm import (
    batch_norm_fold,
    batch_norm_sizes,
    downsample_bias_fold,
    fold_batch_norm,
)
from fastmetro.inference.engine.convolution import residual_chain, stem, takes_raw
from fastmetro.inference.engine.exact_pixels import exact_pixel_constants, fold_pixels
from fastmetro.inference.engine.folded_backbone import FoldedBackbone
from fastmetro.inference.engine.weights import BlockWeights, StemWeights
from fastmetro.models.backbones import CompactTrunk, ResNet50, ResNet50Trunk
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck


class FoldedResNet(FoldedBackbone):
    """ResNet-50, under either set of names, or the compact trunk; see :class:`FoldedBackbone`."""

    def __init__(self, backbone: ResNet50 | ResNet50Trunk | CompactTrunk, dtype: torch.dtype) -> None:
        sizes = batch_norm_sizes(backbone)
        super().__init__(backbone, dtype, [batch_norm_fold(sizes), downsample_bias_fold(sizes)])
        convolution, _, blocks = _parts(backbone)
        self.stem = StemWeights(convolution, dtype)
        self.pixel_stem = StemWeights(convolution, dtype)
        self.blocks = nn.ModuleList(BlockWeights(block, dtype) for block in blocks)
        self._load(backbone)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features, in channels_last and of the folded type, of images in any layout and floating point type."""
        prepared = images if takes_raw(images, self.stem) else self._prepare(images)
        return self._behind(stem(prepared, self.stem))

    def pixel_constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """So that pixels are exact."""
        return exact_pixel_constants(self.dtype, device)

    @torch.no_grad()
    def of_pixels(self, images: Tensor) -> Tensor:
        """Features of pixels; see :class:`FoldedBackbone`."""
        return self._behind(stem(images, self.pixel_stem))

    @torch.no_grad()
    def of_bytes(self, pixels: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Features of uint8 images; see :class:`FoldedBackbone`."""
        if takes_raw(pixels, self.pixel_stem):
            return self._behind(stem(pixels, self.pixel_stem, mean, scale))
        return super().of_bytes(pixels, mean, scale)

    def _behind(self, x: Tensor) -> Tensor:
        """All that is behind the stem."""
        return residual_chain(x, cast("list[BlockWeights]", list(self.blocks)))

    def _load(self, backbone: nn.Module) -> None:
        convolution, norm, blocks = _parts(backbone)
        weight, bias = fold_batch_norm(convolution, norm)
        self.stem.load(weight, bias)
        self.pixel_stem.load(*fold_pixels(weight, bias, self.dtype))
        for mine, block in zip(self.blocks, blocks, strict=True):
            cast(BlockWeights, mine).load(block)


def _parts(backbone: nn.Module) -> tuple[nn.Conv2d, nn.Module, list[BasicBlock | Bottleneck]]:
    """Convolution and batch norm of the stem, and the blocks of all stages."""
    convolution, norm, _relu, _pool, *stages = backbone.children()
    blocks = [cast("BasicBlock | Bottleneck", block) for stage in stages for block in cast(nn.Sequential, stage)]
    return cast(nn.Conv2d, convolution), norm, blocks
