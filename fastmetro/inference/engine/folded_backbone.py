"""What all folded backbones have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fastmetro.inference.engine.preprocessing import pixel_constants
from fastmetro.inference.engine.report import Fold
from fastmetro_kernels import fused


class FoldedBackbone(nn.Module, ABC):
    """A backbone for inference only: images [B, 3, H, W] to features [B, out_channels, h, w], without gradients.

    Args:
        backbone: the trained backbone; it is left as it is, and its mode does not matter.
        dtype: of weights and activations.
        folds: what was folded.

    Attributes:
        out_channels: channels of the features.
        folds: as given.
    """

    def __init__(self, backbone: nn.Module, dtype: torch.dtype, folds: list[Fold]) -> None:
        super().__init__()
        self.out_channels: int = getattr(backbone, "out_channels", 2048)
        self.folds = folds
        self.dtype = dtype
        self._source = type(backbone)

    @torch.no_grad()
    def refresh(self, backbone: nn.Module) -> None:
        """Fold the weights of ``backbone`` into the tensors that are there, so that captured graphs use them.

        Not while a forward pass runs.

        Raises:
            TypeError: it is not a backbone of the type that was folded.
        """
        if type(backbone) is not self._source:
            raise TypeError(f"backbone must be a {self._source.__name__}, as was folded, got {type(backbone).__name__}")
        with torch.inference_mode(False):
            self._load(backbone)

    def pixel_constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and scale, float32 [3], of the pixels that :meth:`of_pixels` takes: (pixels - mean) * scale."""
        return pixel_constants(device)

    def of_pixels(self, images: Tensor) -> Tensor:
        """Features, as of a call, of pixels [B, 3, H, W] under :meth:`pixel_constants`, in the folded type."""
        return self(images)

    def of_bytes(self, pixels: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """The features of :meth:`of_pixels` of uint8 [B, H, W, 3]; the constants are :meth:`pixel_constants`."""
        return self.of_pixels(fused.normalize_pixels(pixels, mean, scale, self.dtype))

    def _prepare(self, images: Tensor) -> Tensor:
        """Images in channels_last and of the folded type; themselves where they are."""
        if images.is_cuda and images.is_contiguous() and images.dtype != self.dtype:
            return fused.to_channels_last(images, self.dtype)
        return images.to(self.dtype, memory_format=torch.channels_last)

    @abstractmethod
    def _load(self, backbone: nn.Module) -> None:
        """Fold the weights of ``backbone`` into the buffers."""
