"""Images in another order and dtype, in one pass."""

from fastmetro_kernels.fused.channels_last.api import to_channels_last

__all__ = ["to_channels_last"]
