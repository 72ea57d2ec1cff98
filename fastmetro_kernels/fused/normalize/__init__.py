"""Layer norm of rows without gain and bias."""

from fastmetro_kernels.fused.normalize.api import normalize_rows
from fastmetro_kernels.fused.normalize.configs import NormalizeConfig

__all__ = ["NormalizeConfig", "normalize_rows"]
