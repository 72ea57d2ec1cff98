"""Norm of gradients, clipping and AdamW over lists of tensors, in three launches."""

from fastmetro_kernels.adamw.api import AdamWGroup, adamw, gradient_norm, same_layout
from fastmetro_kernels.adamw.plan import AdamWConfig
from fastmetro_kernels.adamw.tables import Tables

__all__ = ["AdamWConfig", "AdamWGroup", "Tables", "adamw", "gradient_norm", "same_layout"]
