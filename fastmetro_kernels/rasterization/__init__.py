"""Batched z-buffer rasteriser: vertices in pixels and depth -> face index, barycentrics and depth per pixel."""

from fastmetro_kernels.rasterization.api import RasterOutput, interpolate, rasterize

__all__ = ["RasterOutput", "interpolate", "rasterize"]
