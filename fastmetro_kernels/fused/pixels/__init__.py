"""Pixels to the numbers that a network takes."""

from fastmetro_kernels.fused.pixels.api import normalize_pixels
from fastmetro_kernels.fused.pixels.configs import PixelsConfig

__all__ = ["PixelsConfig", "normalize_pixels"]
