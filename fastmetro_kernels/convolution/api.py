"""The public op: checks and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution import native, ops, reference
from fastmetro_kernels.convolution.configs import DEPTH, ConvolutionConfig, Shape, pinned, problem
from fastmetro_kernels.convolution.layout import ConvolutionWeights, output_size
from fastmetro_kernels.fused.inference import check_tensor, refuse_gradients

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def convolution(
    x: Tensor,
    weights: ConvolutionWeights,
    *,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    relu: bool = True,
    config: ConvolutionConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """``act(conv(x) + conv_1x1(second) + bias + residual)`` of channels_last images, for inference.

    Sums are in float32 and rounded once. The order of additions is fixed: the same bits in every run.

    Args:
        x: ``[N, C, H, W]`` float16 or bfloat16 (reference: any floating point type); other orders than channels_last
            are copied.
        weights: of :func:`lay_out`, of the dtype and device of x.
        residual: ``[N, O, P, Q]``, added in front of the ReLU.
        second: ``[N, C2, H2, W2]``, input of the second convolution, if the weights have one.
        relu: whether act is ReLU.
        config: the tile instead of the pinned one, for measurements (native).
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``[N, O, P, Q]`` in the dtype of x, channels_last.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not fit; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    shape = _check(x, weights, residual, second)
    refuse_gradients("convolution", {"x": x, "weight": weights.weight, "residual": residual, "second": second})
    choices = {"reference": [], "native": native.reasons(x.device, x.dtype)}
    chosen = backends.select("convolution", backend, choices, ("native", "reference"))
    if chosen == "reference":
        return reference.convolution(x, weights, residual, second, relu)
    config = config or pinned(shape)
    if found := problem(config, shape.chunks):
        raise ValueError(f"config: {found}")
    moved = [None if tensor is None else _rows(tensor) for tensor in (residual, second)]
    out = ops.convolution_native(
        _rows(x), weights.weight, weights.bias, *moved, weights.second_weight, weights.stride, weights.padding,
        weights.second_stride, relu, list(map(int, config)),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], contiguous; a view where the images are channels_last."""
    return images.permute(0, 2, 3, 1).contiguous()


def _check(x: Tensor, weights: ConvolutionWeights, residual: Tensor | None, second: Tensor | None) -> Shape:
    check_tensor("x", x, _DTYPES)
    if not isinstance(weights, ConvolutionWeights):
        raise TypeError(f"weights must come from lay_out, got {type(weights).__name__}")
    check_tensor("weights.weight", weights.weight, (x.dtype,), x.device)
    outputs, down, across, channels = weights.weight.shape
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be [N, {channels}, H, W], got {list(x.shape)}")
    height, width = output_size(x.shape[2], x.shape[3], weights)
    if height < 1 or width < 1:
        raise ValueError(f"x must be at least as large as the kernel of {down} x {across}, got {list(x.shape)}")
    expected = [x.shape[0], outputs, height, width]
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), x.device)
        if list(residual.shape) != expected:
            raise ValueError(f"residual must be {expected}, got {list(residual.shape)}")
    if (second is None) != (weights.second_weight is None):
        raise ValueError("second must be given if, and only if, the weights have a second convolution")
    chunks = down * across * -(-channels // DEPTH)
    if second is not None and weights.second_weight is not None:
        check_tensor("second", second, (x.dtype,), x.device)
        more = weights.second_weight.shape[3]
        sizes = [(size - 1) // weights.second_stride + 1 for size in second.shape[2:]]
        if second.dim() != 4 or second.shape[:2] != (x.shape[0], more) or sizes != expected[2:]:
            wanted = f"[{x.shape[0]}, {more}, H2, W2] that gives {expected}"
            raise ValueError(f"second must be {wanted}, got {list(second.shape)}")
        chunks += -(-more // DEPTH)
    return Shape(x.shape[0] * height * width, outputs, chunks)
