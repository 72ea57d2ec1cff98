"""Attention over few keys, the output projection and the residual in one launch."""

from fastmetro_kernels.fused.cross_attention_block.api import cross_attention_block
from fastmetro_kernels.fused.cross_attention_block.configs import BlockConfig

__all__ = ["BlockConfig", "cross_attention_block"]
