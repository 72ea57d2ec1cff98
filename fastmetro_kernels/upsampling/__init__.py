"""Sparse upsampling: a batch of vertices or features times one constant sparse matrix."""

from fastmetro_kernels.upsampling.api import sparse_upsample

__all__ = ["sparse_upsample"]
