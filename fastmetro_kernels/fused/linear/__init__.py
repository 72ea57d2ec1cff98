"""A linear layer in one launch, with the layer norm before it and the activation and residual after it."""

from fastmetro_kernels.fused.linear.api import fused_linear, fused_linear_moments
from fastmetro_kernels.fused.linear.configs import LinearConfig
from fastmetro_kernels.fused.linear.native import NativeLinearConfig

__all__ = ["LinearConfig", "NativeLinearConfig", "fused_linear", "fused_linear_moments"]
