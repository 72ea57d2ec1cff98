"""The gradient of the weight of a network's first convolution, which takes images of few channels."""

from fastmetro_kernels.image_weight_gradient.api import image_weight_gradient
from fastmetro_kernels.image_weight_gradient.plan import ImageWeightGradientConfig

__all__ = ["ImageWeightGradientConfig", "image_weight_gradient"]
