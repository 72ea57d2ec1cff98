"""Batch norm in training with the residual and ReLU behind it, forward and backward."""

from fastmetro_kernels.batch_norm.api import RunningMoments, batch_norm

__all__ = ["RunningMoments", "batch_norm"]
