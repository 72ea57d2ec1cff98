"""The residual sum of a transformer with its dropout and the layer norm behind it in training, both passes."""

from fastmetro_kernels.residual_norm.api import final_residual_norm, residual_norm
from fastmetro_kernels.residual_norm.plan import ResidualNormConfig

__all__ = ["ResidualNormConfig", "final_residual_norm", "residual_norm"]
