"""Batch norm in training with the residual and ReLU behind it, forward and backward."""

from fastmetro_kernels.batch_norm.api import ResidualNorm, RunningMoments, batch_norm, batch_norm_twice, make_counters
from fastmetro_kernels.batch_norm.plan import BatchNormConfig

__all__ = ["BatchNormConfig", "ResidualNorm", "RunningMoments", "batch_norm", "batch_norm_twice", "make_counters"]
