"""Square crops of many pictures of different sizes, ready for a network."""

from fastmetro_kernels.fused.crops.api import render_crops
from fastmetro_kernels.fused.crops.ops import CropMap

__all__ = ["CropMap", "render_crops"]
