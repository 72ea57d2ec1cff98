"""Batch norm in training with the residual and ReLU behind it, forward and backward."""

from fastmetro_kernels.batch_norm.api import batch_norm

__all__ = ["batch_norm"]
