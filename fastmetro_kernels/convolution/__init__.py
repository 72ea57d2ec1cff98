"""Convolution + bias (+ residual) (+ ReLU) in one kernel, for inference at small batches; see :func:`convolution`."""

from fastmetro_kernels.convolution.api import choose, convolution
from fastmetro_kernels.convolution.configs import ConvolutionConfig
from fastmetro_kernels.convolution.layout import ConvolutionWeights, lay_out

__all__ = ["ConvolutionConfig", "ConvolutionWeights", "choose", "convolution", "lay_out"]
