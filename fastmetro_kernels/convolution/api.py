"""The public op: checks and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution import choice, native, ops, reference
from fastmetro_kernels.convolution.configs import MOST_SCALE, ConvolutionConfig, pinned, problem
from fastmetro_kernels.convolution.layout import ConvolutionWeights
from fastmetro_kernels.convolution.table import Layer
from fastmetro_kernels.fused.inference import check_tensor, refuse_gradients

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def convolution(
    x: Tensor,
    weights: ConvolutionWeights,
    *,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    relu: bool = True,
    late: bool = False,
    scale: int = 1,
    config: ConvolutionConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """``act(repeat(conv(x) + conv_1x1(second) + bias) + residual)`` of channels_last images, for inference.

    Sums are in float32 and rounded once. The order of additions is fixed: the same bits in every run. The kernel reads
    weights before the kernel in front of it has ended (see ``ConvolutionConfig.early``), which must not write them.

    Args:
        x: ``[N, C, H, W]`` float16 or bfloat16 (reference: any floating point type); other orders than channels_last
            are copied.
        weights: of :func:`lay_out`, of the dtype and device of x.
        residual: ``[N, O, P scale, Q scale]``, added in front of the ReLU, or behind it where ``late``.
        second: ``[N, C2, H2, W2]``, input of the second convolution, if the weights have one.
        relu: whether act is ReLU.
        late: ``act(repeat(conv(x) + conv_1x1(second) + bias)) + residual`` instead: needs a residual and relu.
        scale: nearest upsampling of the sums: each is repeated so often down and across; 1 to 32.
        config: the tile instead of the chosen one, for measurements (native).
        backend: ``"auto"`` (see :func:`choose`), ``"native"`` or ``"reference"``.

    Returns:
        ``[N, O, P scale, Q scale]`` in the dtype of x, channels_last.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not fit; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    layer = layer_of(x, weights, residual, second, scale)
    if late and (residual is None or not relu):
        given = "no residual" if residual is None else f"relu={relu}"
        raise ValueError(f"late needs a residual and relu=True, got {given}")
    refuse_gradients("convolution", {"x": x, "weight": weights.weight, "residual": residual, "second": second})
    choices = {"reference": [], "native": native.reasons(x.device, x.dtype)}
    measured = None if choices["native"] else choice.choose(x.device, layer)
    order = ("native", "reference") if config or measured else ("reference",)
    if backends.select("convolution", backend, choices, order) == "reference":
        return reference.convolution(x, weights, residual, second, relu, scale, late)
    config = config or measured or pinned(layer.shape, layer.scale)
    if found := problem(config, layer.shape.chunks, scale, layer.shape.box):
        raise ValueError(f"config: {found}")
    moved = [None if tensor is None else channels_last_rows(tensor) for tensor in (residual, second)]
    out = ops.convolution_native(
        channels_last_rows(x), weights.weight, weights.bias, *moved, weights.second_weight, weights.stride,
        weights.padding, weights.second_stride, relu, late, scale, list(map(int, config)),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def choose(
    x: Tensor,
    weights: ConvolutionWeights,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    scale: int = 1,
) -> ConvolutionConfig | None:
    """The tile with which :func:`convolution` runs the kernel by ``"auto"``, or None: it takes the library.

    By the measured table of the device's family, else by a rule: see ``python -m fastmetro_kernels.info``.

    Args, Raises: as of :func:`convolution`.
    """
    layer = layer_of(x, weights, residual, second, scale)
    return None if native.reasons(x.device, x.dtype) else choice.choose(x.device, layer)


def channels_last_rows(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], contiguous; a view where the images are channels_last."""
    return images.permute(0, 2, 3, 1).contiguous()


def layer_of(
    x: Tensor, weights: ConvolutionWeights, residual: Tensor | None, second: Tensor | None, scale: int = 1
) -> Layer:
    """What a call is, once its arguments are checked; see :func:`convolution`."""
    check_tensor("x", x, _DTYPES)
    if not isinstance(weights, ConvolutionWeights):
        raise TypeError(f"weights must come from lay_out, got {type(weights).__name__}")
    check_tensor("weights.weight", weights.weight, (x.dtype,), x.device)
    outputs, down, across, channels = weights.weight.shape
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be [N, {channels}, H, W], got {list(x.shape)}")
    images, _, height, width = x.shape
    more = 0 if weights.second_weight is None else weights.second_weight.shape[3]
    if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= MOST_SCALE:
        raise ValueError(f"scale must be a whole number of 1 to {MOST_SCALE}, got {scale!r}")
    layer = Layer(
        images, height, width, channels, outputs, down, across, weights.stride, weights.padding, more, scale=scale
    )
    if min(layer.output) < 1:
        raise ValueError(f"x must be at least as large as the kernel of {down} x {across}, got {list(x.shape)}")
    expected = [images, outputs, *(size * scale for size in layer.output)]
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), x.device)
        if list(residual.shape) != expected:
            raise ValueError(f"residual must be {expected}, got {list(residual.shape)}")
    if (second is None) != (weights.second_weight is None):
        raise ValueError("second must be given if, and only if, the weights have a second convolution")
    if second is not None:
        check_tensor("second", second, (x.dtype,), x.device)
        sizes = [(size - 1) // weights.second_stride + 1 for size in second.shape[2:]]
        if second.dim() != 4 or second.shape[:2] != (images, more) or sizes != list(layer.output):
            wanted = f"[{images}, {more}, H2, W2] that gives {list(layer.output)}"
            raise ValueError(f"second must be {wanted}, got {list(second.shape)}")
    return layer
