"""The case of the pixels: bytes to the backbone's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.fused.basis import BYTES_PER_SECOND, OURS, Run, tile_name
from fastmetro_kernels.fused import PixelsConfig, normalize_pixels
from fastmetro_kernels.fused.pixels.configs import TILES


@dataclass(frozen=True)
class Pixels:
    """(pixels - mean) * scale of images of 224 x 224, in channels_last order."""

    batch: int
    dtype: torch.dtype
    side: int = 224
    activation_count: int = 1
    name: str = "pixels"

    @property
    def shape(self) -> str:
        """Images, height, width, channels."""
        return f"{self.batch}*{self.side} x {self.side} x 3"

    def activations(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """uint8 [B, H, W, 3]."""
        shape = (self.batch, self.side, self.side, 3)
        return (torch.randint(256, shape, generator=generator, device=generator.device, dtype=torch.uint8),)

    def constants(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Mean and scale, float32 [3]."""
        mean, scale = torch.rand(2, 3, generator=generator, device=generator.device)
        return 100 + 50 * mean, (1 + scale) / 100

    def floor(self) -> float:
        """Seconds that moving the bytes takes at least."""
        return self.batch * self.side**2 * 3 * (1 + self.dtype.itemsize) / BYTES_PER_SECOND

    def plain(self, pixels: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """PyTorch's four kernels; in float64, against which results are held, without the last one's rounding."""
        dtype = torch.float64 if mean.dtype == torch.float64 else self.dtype
        return ((pixels.to(mean.dtype) - mean) * scale).to(dtype).permute(0, 3, 1, 2)

    def _fused(self, config: PixelsConfig | None) -> Run:
        return lambda *tensors: normalize_pixels(*tensors, self.dtype, config=config)

    def ours(self) -> dict[str, Run]:
        """The fused op as the engine calls it."""
        return {OURS: self._fused(None)}

    def tiles(self) -> dict[str, Run]:
        """The fused op with every tile of its table."""
        return {tile_name(tile): self._fused(tile) for tile in TILES}
