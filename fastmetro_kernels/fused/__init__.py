"""Fused blocks of transformers for inference: linear layers with all that surrounds them, attention over few keys;
and pictures made ready for a network."""

from fastmetro_kernels.fused.channels_last import to_channels_last
from fastmetro_kernels.fused.crops import CropMap, render_crops
from fastmetro_kernels.fused.decoder_tail import TailConfig, TailWeights, decoder_tail
from fastmetro_kernels.fused.linear import LinearConfig, NativeLinearConfig, fused_linear, fused_linear_moments
from fastmetro_kernels.fused.normalize import NormalizeConfig, normalize_rows
from fastmetro_kernels.fused.pixels import PixelsConfig, normalize_pixels
from fastmetro_kernels.fused.short_attention import ShortAttentionConfig, short_attention

__all__ = [
    "CropMap",
    "LinearConfig",
    "NativeLinearConfig",
    "NormalizeConfig",
    "PixelsConfig",
    "ShortAttentionConfig",
    "TailConfig",
    "TailWeights",
    "decoder_tail",
    "fused_linear",
    "fused_linear_moments",
    "normalize_pixels",
    "normalize_rows",
    "render_crops",
    "short_attention",
    "to_channels_last",
]
