"""A convolution that also tells the moments of its results, for the batch norm behind it in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution import choice, native, ops, reference
from fastmetro_kernels.convolution.api import channels_last_rows, layer_of
from fastmetro_kernels.convolution.configs import ROWS, ConvolutionConfig, pinned, problem
from fastmetro_kernels.convolution.layout import ConvolutionWeights
from fastmetro_kernels.fused.inference import refuse_gradients


class ConvolutionMoments(NamedTuple):
    """Of groups of results, counted through all images row by row.

    Attributes:
        values: float32 ``[2, groups, O]``: the mean of a group's results of each channel, and the sum of the squares of
            what they are off it.
        rows: of a group; the last has what is left.
    """

    values: Tensor
    rows: int


def convolution_moments(
    x: Tensor, weights: ConvolutionWeights, *, config: ConvolutionConfig | None = None, backend: str = "auto"
) -> tuple[Tensor, ConvolutionMoments]:
    """``conv(x) + bias`` of channels_last images, and the moments of the results as they are rounded.

    The kernel has the results on chip, so that a batch norm need not read them for its mean and variance. Their groups
    join by the formula of Chan, Golub and LeVeque (1979). It has no gradients of its own. The kernel reads weights
    before the kernel in front of it has ended (see ``ConvolutionConfig.early``), which must not write them.

    Args:
        x: ``[N, C, H, W]`` float16 or bfloat16 (reference: any floating point type); other orders than channels_last
            are copied.
        weights: of :func:`lay_out`, without a second convolution.
        config: the tile instead of the chosen one, not with ``once`` (native).
        backend: ``"auto"`` (native where it can run), ``"native"`` or ``"reference"``.

    Returns:
        ``[N, O, P, Q]`` in the dtype of x, channels_last, and the moments.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not fit; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    if isinstance(weights, ConvolutionWeights) and weights.second_weight is not None:
        raise ValueError("weights must be those of one convolution, got a second one")
    layer = layer_of(x, weights, None, None)
    refuse_gradients("convolution_moments", {"x": x, "weight": weights.weight})
    choices = {"native": native.reasons(x.device, x.dtype), "reference": []}
    if backends.select("convolution_moments", backend, choices, ("native", "reference")) == "reference":
        out = reference.convolution(x, weights, None, None, False).contiguous(memory_format=torch.channels_last)
        return out, ConvolutionMoments(_moments(out), ROWS)
    config = config or moments_config(x, weights)
    found = "once must be False" if config.once else problem(config, layer.shape.chunks)
    if found:
        raise ValueError(f"config: {found}")
    options = weights.stride, weights.padding, list(map(int, config))
    result, values = ops.convolution_moments_native(channels_last_rows(x), weights.weight, weights.bias, *options)
    return result.permute(0, 3, 1, 2), ConvolutionMoments(values, ROWS // config.split)


def moments_config(x: Tensor, weights: ConvolutionWeights) -> ConvolutionConfig:
    """The tile with which :func:`convolution_moments` runs the kernel: that of the measured table where it has one for
    this layer and it is not one of ``once``, else by a rule.

    Args, Raises: as of :func:`convolution_moments`.
    """
    layer = layer_of(x, weights, None, None)
    measured = choice.choose(x.device, layer)
    return pinned(layer.shape) if measured is None or measured.once else measured


def _moments(out: Tensor) -> Tensor:
    """Of the reference's results."""
    wide = torch.promote_types(out.dtype, torch.float32)
    rows = out.permute(0, 2, 3, 1).flatten(0, 2).to(wide)
    found = rows.new_empty((2, -(-len(rows) // ROWS), rows.shape[1]))
    for group, part in enumerate(rows.split(ROWS) if len(rows) else ()):
        found[0, group] = part.mean(0)
        found[1, group] = (part - found[0, group]).square().sum(0)
    return found
