"""Two pointwise convolutions in one kernel: the last of a residual block and the first of the block that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution import choice, native, reference
from fastmetro_kernels.convolution.api import channels_last_rows, layer_of
from fastmetro_kernels.convolution.configs import NARROW, WIDE, PairConfig, pair_configs
from fastmetro_kernels.convolution.layout import ConvolutionWeights
from fastmetro_kernels.convolution.ops import NAMESPACE
from fastmetro_kernels.convolution.table import Layer
from fastmetro_kernels.fused.inference import refuse_gradients


def pair_problem(weights: ConvolutionWeights, following: ConvolutionWeights) -> str | None:
    """What keeps two convolutions from being one kernel, or None."""
    outputs, *taps, _ = weights.weight.shape
    more, *more_taps, channels = following.weight.shape
    if outputs not in WIDE or taps != [1, 1] or weights.stride != 1:
        return f"weights must be 1 x 1 of stride 1 to {WIDE} channels, got {list(weights.weight.shape)}"
    if more not in NARROW or more_taps != [1, 1] or following.stride != 1 or channels != outputs:
        return f"following must be 1 x 1 of stride 1 from {outputs} to {NARROW}, got {list(following.weight.shape)}"
    if following.second_weight is not None:
        return "following must have no second convolution"
    return None


def convolution_pair(
    x: Tensor,
    weights: ConvolutionWeights,
    following: ConvolutionWeights,
    *,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    config: PairConfig | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``wide = relu(conv(x) + conv_1x1(second) + bias + residual)`` and ``relu(conv(wide) + bias)``, for inference.

    The second reads ``wide`` as it is rounded; the order of additions is fixed.

    Args:
        x, weights, residual, second: as of :func:`fastmetro_kernels.convolution.convolution`; weights are 1 x 1 of
            stride 1 to 256, 512 or 1024 channels.
        following: 1 x 1 of stride 1 from these to 64, 128 or 256 channels.
        config: the cut instead of the chosen one, for measurements (native).
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        Both results, ``[N, K, P, Q]`` and ``[N, M, P, Q]`` in the dtype of x, channels_last.

    Raises:
        TypeError, ValueError, RuntimeError, BackendUnavailable: as of :func:`convolution`, and where the weights are
            not as above.
    """
    layer = pair_layer(x, weights, following, residual, second)
    refuse_gradients("convolution_pair", {"x": x, "weight": weights.weight, "residual": residual, "second": second})
    choices = {"reference": [], "native": native.reasons(x.device, x.dtype)}
    if backends.select("convolution_pair", backend, choices, ("native", "reference")) == "reference":
        wide = reference.convolution(x, weights, residual, second, True)
        return wide, reference.convolution(wide, following, None, None, True)
    config = config or choice.choose_pair(x.device, layer) or pair_configs(layer.shape.chunks, layer.following)[-1]
    moved = [None if tensor is None else channels_last_rows(tensor) for tensor in (residual, second)]
    wide, narrow = torch.ops.fastmetro_kernels.convolution_pair_native(
        channels_last_rows(x), weights.weight, weights.bias, *moved, weights.second_weight, weights.second_stride,
        following.weight, following.bias, list(map(int, config)),
    )  # fmt: skip
    return wide.permute(0, 3, 1, 2), narrow.permute(0, 3, 1, 2)


def choose_pair(
    x: Tensor,
    weights: ConvolutionWeights,
    following: ConvolutionWeights,
    residual: Tensor | None = None,
    second: Tensor | None = None,
) -> PairConfig | None:
    """The cut with which a pair was measured to be faster than two convolutions, or None: they are to be two.

    Args, Raises: as of :func:`convolution_pair`.
    """
    layer = pair_layer(x, weights, following, residual, second)
    return None if native.reasons(x.device, x.dtype) else choice.choose_pair(x.device, layer)


def pair_layer(
    x: Tensor,
    weights: ConvolutionWeights,
    following: ConvolutionWeights,
    residual: Tensor | None,
    second: Tensor | None,
) -> Layer:
    """What a call is, once its arguments are checked; see :func:`convolution_pair`."""
    layer = layer_of(x, weights, residual, second)
    if wrong := pair_problem(weights, following):
        raise ValueError(wrong)
    return layer._replace(following=following.weight.shape[0])


torch.library.define(
    f"{NAMESPACE}::convolution_pair_native",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? second, Tensor? second_weight, "
    "int second_stride, Tensor next_weight, Tensor next_bias, int[] config) -> (Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::convolution_pair_native")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    second_stride: int,
    next_weight: Tensor,
    next_bias: Tensor,
    config: list[int],
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 4 and weight.dim() == 4, lambda: "x must be [N, P, Q, C] and weight [K, 1, 1, C]")
    return x.new_empty((*x.shape[:3], weight.size(0))), x.new_empty((*x.shape[:3], next_weight.size(0)))
