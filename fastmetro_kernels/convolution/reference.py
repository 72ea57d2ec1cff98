"""The op in plain PyTorch: cuDNN's fused convolutions where they are, else one operation after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro_kernels.convolution.layout import ConvolutionWeights, as_conv2d


def convolution(
    x: Tensor,
    weights: ConvolutionWeights,
    residual: Tensor | None,
    second: Tensor | None,
    relu: bool,
    scale: int = 1,
    late: bool = False,
) -> Tensor:
    """Arguments as of :func:`fastmetro_kernels.convolution.convolution`."""
    if late and residual is not None:
        return convolution(x, weights, None, second, relu, scale).add_(residual)
    if scale > 1:
        y = F.interpolate(convolution(x, weights, None, second, False), scale_factor=scale, mode="nearest")
        y = y if residual is None else y.add_(residual)
        return y.relu_() if relu else y
    if second is not None and weights.second_weight is not None:
        more = F.conv2d(second, as_conv2d(weights.second_weight), None, weights.second_stride)
        residual = more if residual is None else more + residual
    weight, bias = as_conv2d(weights.weight), weights.bias.to(x.dtype)
    if relu and x.is_cuda and x.dtype.itemsize == 2 and torch.backends.cudnn.is_available():
        stride, padding = [weights.stride] * 2, [weights.padding] * 2
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, [1, 1], 1)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, [1, 1], 1)
    y = F.conv2d(x, weight, bias, weights.stride, weights.padding)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y
