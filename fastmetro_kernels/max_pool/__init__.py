"""The max pool of a residual network's stem in training, forward and backward."""

from fastmetro_kernels.max_pool.api import max_pool, max_pool_twice
from fastmetro_kernels.max_pool.plan import MaxPoolConfig

__all__ = ["MaxPoolConfig", "max_pool", "max_pool_twice"]
