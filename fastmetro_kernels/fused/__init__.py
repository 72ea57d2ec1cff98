"""Fused blocks of transformers for inference: linear layers with all that surrounds them, attention over few keys."""

from fastmetro_kernels.fused.cross_attention_block import BlockConfig, cross_attention_block
from fastmetro_kernels.fused.linear import LinearConfig, fused_linear, fused_linear_moments
from fastmetro_kernels.fused.normalize import NormalizeConfig, normalize_rows
from fastmetro_kernels.fused.short_attention import ShortAttentionConfig, short_attention

__all__ = [
    "BlockConfig",
    "LinearConfig",
    "NormalizeConfig",
    "ShortAttentionConfig",
    "cross_attention_block",
    "fused_linear",
    "fused_linear_moments",
    "normalize_rows",
    "short_attention",
]
