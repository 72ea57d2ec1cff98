"""The reference backend in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_gradient(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """See ``image_weight_gradient``."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] < stride:
        # oneDNN's convolution for CPUs with AMX adds what lies beside images narrower than the stride.
        return weight_gradient(x.float(), grad.float(), kernel, stride, padding).to(x.dtype)
    like = x.new_empty((grad.shape[1], x.shape[1], kernel, kernel))
    options = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False])
    found = torch.ops.aten.convolution_backward(grad, x, like, *options)[1]
    return found.contiguous(memory_format=torch.channels_last)
