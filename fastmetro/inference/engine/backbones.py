"""Backbones, folded for inference."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from fastmetro.inference.engine.folded_backbone import FoldedBackbone
from fastmetro.inference.engine.folded_hrnet import FoldedHRNet
from fastmetro.inference.engine.folded_resnet import FoldedResNet
from fastmetro.inference.engine.report import Fold
from fastmetro.inference.engine.weights import AUTO, CONVOLUTIONS, ConvolutionWeights
from fastmetro.models.backbones import CompactTrunk, HRNetW64, ResNet50, ResNet50Trunk

__all__ = ["FoldedBackbone", "UnknownBackbone", "fold_backbone"]


class UnknownBackbone(FoldedBackbone):
    """A copy of any other backbone, in evaluation mode and in the given type, otherwise as it is."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype) -> None:
        description = f"{type(backbone).__name__} is not a backbone that the engine knows: nothing in it is folded"
        super().__init__(backbone, dtype, [Fold("unknown-backbone", description, 0)])
        self.backbone = copy.deepcopy(backbone).to(dtype=dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """What the backbone returns for images of the given type, on a CPU in the layout that they have."""
        return self.backbone(self._prepare(images) if images.is_cuda else images.to(self.dtype))

    def _load(self, backbone: nn.Module) -> None:
        mine, theirs = (_tensors(module) for module in (self.backbone, backbone))
        if mine.keys() != theirs.keys():
            raise ValueError(
                "backbone must have the parameters and buffers of the one that was folded; they differ in "
                f"{sorted(mine.keys() ^ theirs.keys())}"
            )
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def fold_backbone(backbone: nn.Module, dtype: torch.dtype, convolutions: str = AUTO) -> FoldedBackbone:
    """Fold a trained backbone for inference: batch norms into convolutions, biases together.

    Folding is exact: computed in float64 from the weights as they are and rounded once to ``dtype``. Only the very
    types that the engine knows are folded; a subclass may do anything in its forward pass and is used as it is.

    Args:
        backbone: ResNet50, ResNet50Trunk, CompactTrunk, HRNetW64, or any other module, which is used as it is. It is
            not changed and need not be in evaluation mode.
        dtype: of weights and activations.
        convolutions: who computes them, one of `CONVOLUTIONS` of ``weights.py``; an unknown backbone's are PyTorch's.

    Returns:
        A module with the same call on the same device; ``folds`` says what was folded, and ``refresh`` takes new
        weights in place.

    Raises:
        TypeError: ``backbone`` is not a module, or ``dtype`` not a floating point type.
        ValueError: a batch norm keeps no running statistics, a convolution is grouped, dilated or not padded with
            zeros, or ``convolutions`` is unknown.
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be an nn.Module, got {type(backbone).__name__}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    if convolutions not in CONVOLUTIONS:
        accepted = ", ".join(map(repr, CONVOLUTIONS))
        raise ValueError(f"convolutions must be one of {accepted}, got {convolutions!r}")
    # Tensors made in inference mode could not be written to outside it later.
    with torch.inference_mode(False):
        folded = _fold(backbone, dtype)
    for module in folded.modules():
        if isinstance(module, ConvolutionWeights):
            module.backend = convolutions
    return folded


def _fold(backbone: nn.Module, dtype: torch.dtype) -> FoldedBackbone:
    if type(backbone) is HRNetW64:
        return FoldedHRNet(backbone, dtype)
    if type(backbone) in (ResNet50, ResNet50Trunk, CompactTrunk):
        return FoldedResNet(cast("ResNet50 | ResNet50Trunk | CompactTrunk", backbone), dtype)
    return UnknownBackbone(backbone, dtype)
