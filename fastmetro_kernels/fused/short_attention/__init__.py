"""Dense attention over so few keys that they fit one tile."""

from fastmetro_kernels.fused.short_attention.api import short_attention
from fastmetro_kernels.fused.short_attention.configs import ShortAttentionConfig

__all__ = ["ShortAttentionConfig", "short_attention"]
