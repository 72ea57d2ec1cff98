"""HRNet's beginning in one kernel: two 3 x 3 convolutions of stride 2, from 3 to 64 and to 64 channels, bias, ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution.ops import NAMESPACE
from fastmetro_kernels.convolution.stem import CHANNELS, stem_reasons
from fastmetro_kernels.convolution.stem_images import (
    INPUTS,
    check_images,
    image_size,
    kernel_images,
    made_size,
    own_images,
)
from fastmetro_kernels.fused.inference import check_tensor, refuse_gradients

TAPS = 9
FIRST_PACKED, SECOND_PACKED = (2, 2, 2, 32, 8), (4, 36, 32, 8)
"""Share of the channels, step of 16 numbers of the depth, (of the first: two tiles of 8 channels,) lane, what it loads
at once. As in ``csrc/convolution/double_stem.cuh``."""
_WEIGHTS = {"first": (CHANNELS, INPUTS, 3, 3), "second": (CHANNELS, CHANNELS, 3, 3)}


class DoubleStemConfig(NamedTuple):
    """How the stem is cut.

    Attributes:
        height: rows of a tile, which is 8 positions wide.
        early: whether to start before the kernel in front has ended (compute capability 9.0).
    """

    height: int
    early: bool = True


_CONFIGS = (DoubleStemConfig(8), DoubleStemConfig(4))


class DoubleStemWeights(NamedTuple):
    """What the stem is made of; see :func:`lay_out_double_stem`.

    Attributes:
        first, second: [64, 3, 3, 3] and [64, 64, 3, 3], as of ``nn.Conv2d``.
        first_bias, second_bias: float32 [64].
        packed_first, packed_second: the weights as the kernel's lanes load them: :func:`pack_double_stem`.
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    packed_first: Tensor
    packed_second: Tensor


def double_stem_configs() -> tuple[DoubleStemConfig, ...]:
    """All tiles there are, the largest first."""
    return _CONFIGS


def choose_double_stem(images: int, height: int, width: int, multiprocessors: int = 132) -> DoubleStemConfig:
    """The largest tile of which there are enough for all multiprocessors, else the smallest.

    Args:
        images, height, width: of the output.
        multiprocessors: of the device.
    """
    for config in _CONFIGS:
        if images * -(-height // config.height) * -(-width // 8) >= multiprocessors:
            return config
    return _CONFIGS[-1]


def pack_double_stem(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The weights in the order of the kernel's registers.

    Args:
        first, second: [64, 3, 3, 3] and [64, 64, 3, 3].

    Returns:
        [2, 2, 2, 32, 8] and [4, 36, 32, 8], contiguous.

    Raises:
        ValueError: another shape.
    """
    for name, weight in (("first", first), ("second", second)):
        if weight.shape != _WEIGHTS[name]:
            raise ValueError(f"{name} must be {list(_WEIGHTS[name])}, got {list(weight.shape)}")
    rows = F.pad(first.permute(0, 2, 3, 1).flatten(2), (1, 0)).flatten(1)  # a row of taps is a zero and 9 numbers
    depths = F.pad(rows, (0, 2)), second.permute(0, 2, 3, 1)
    orders = _first_order(), _second_order()
    packed = [depth.flatten()[order.to(depth.device)] for depth, order in zip(depths, orders, strict=True)]
    return packed[0], packed[1]


def lay_out_double_stem(first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> DoubleStemWeights:
    """Order the stem's weights.

    Args:
        first, second: [64, 3, 3, 3] and [64, 64, 3, 3], as of ``nn.Conv2d``.
        first_bias, second_bias: [64] each.

    Raises:
        ValueError: another shape.
    """
    for name, bias in (("first_bias", first_bias), ("second_bias", second_bias)):
        if bias.shape != (CHANNELS,):
            raise ValueError(f"{name} must be [{CHANNELS}], got {list(bias.shape)}")
    biases = [bias.float().contiguous() for bias in (first_bias, second_bias)]
    return DoubleStemWeights(first, biases[0], second, biases[1], *pack_double_stem(first, second))


def convolution_double_stem(
    x: Tensor,
    weights: DoubleStemWeights,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    config: DoubleStemConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """``relu(conv(relu(conv(x) + bias)) + bias)`` of images, for inference; pixels must be finite.

    Sums are in float32; what the first convolution gives is rounded to the dtype of the weights, and so is the result.
    Equal calls give equal bits. Images as they come give the bits of those that were brought to that dtype before;
    padding is 0 in what the convolution takes. A pixel that is not finite also reaches outputs beside those whose
    windows hold it.

    Args:
        x: ``[N, 3, H, W]`` of the dtype of the weights; other orders than channels_last are copied. Or as images come:
            float32 ``[N, 3, H, W]``, rounded to that dtype (other orders than the usual one are copied), or uint8
            ``[N, H, W, 3]``, of which ``(x - mean) * scale`` is taken, in float32 and rounded once.
        weights: of :func:`lay_out_double_stem`, float16 or bfloat16 (reference: float32 and float64, too), on the
            device of x.
        mean, scale: float32 ``[3]`` on the device of x, for uint8 images.
        config: one of :func:`double_stem_configs` (native), with or without ``early``; default:
            :func:`choose_double_stem`.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``[N, 64, P, Q]`` in the dtype of the weights, channels_last; P = ceil(H / 4), Q likewise.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not fit; a config that is none; uint8 images without mean and scale, or
            others with them; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    _check(x, weights, config, mean, scale)
    given = {"x": x, "first": weights.first, "second": weights.second, "mean": mean, "scale": scale}
    refuse_gradients("convolution_double_stem", given)
    dtype = weights.first.dtype
    choices = {"reference": [], "native": stem_reasons(x.device, dtype)}
    if backends.select("convolution_double_stem", backend, choices, ("native", "reference")) == "reference":
        return _reference(own_images(x, dtype, mean, scale), weights)
    if config is None:
        height, width = image_size(x)
        config = choose_double_stem(x.shape[0], -(-height // 4), -(-width // 4))
    if mean is not None and scale is not None:
        mean, scale = mean.contiguous(), scale.contiguous()
    out = torch.ops.fastmetro_kernels.convolution_double_stem(
        kernel_images(x, dtype), weights.packed_first, weights.first_bias, weights.packed_second, weights.second_bias,
        [config.height, int(config.early)], mean, scale,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _reference(x: Tensor, weights: DoubleStemWeights) -> Tensor:
    for weight, bias in ((weights.first, weights.first_bias), (weights.second, weights.second_bias)):
        x = F.conv2d(x, weight.to(memory_format=torch.channels_last), bias.to(x.dtype), 2, 1).relu_()
    return x.to(memory_format=torch.channels_last)


def _check(
    x: Tensor, weights: DoubleStemWeights, config: DoubleStemConfig | None, mean: Tensor | None, scale: Tensor | None
) -> None:
    if not isinstance(weights, DoubleStemWeights):
        raise TypeError(f"weights must come from lay_out_double_stem, got {type(weights).__name__}")
    check_images(x, weights.first, "weights.first", mean, scale)
    check_tensor("weights.second", weights.second, (weights.first.dtype,), x.device)
    if config is not None and config._replace(early=True) not in _CONFIGS:
        heights = " or ".join(str(one.height) for one in _CONFIGS)
        raise ValueError(f"config must be a tile of {heights} rows, got {config.height}")


# A lane of tensor cores has, of each of a step's two registers, two numbers that lie side by side in the depth; t =
# lane % 4 tells which. Lane 4 n + t gets the sums of columns 2 t and 2 t + 1 of each tile of 8 channels: channels are
# in such an order that these lie side by side for all tiles of a warp.
@cache
def _first_order() -> Tensor:
    """Where each packed number comes from in [64, 32], flat: int64 of shape ``FIRST_PACKED``."""
    half, step, two, lane, number = torch.meshgrid(*(torch.arange(size) for size in FIRST_PACKED), indexing="ij")
    tile, register, element = 2 * two + number // 4, number // 2 % 2, number % 2
    column, t = lane // 4, lane % 4
    channel = 32 * half + 8 * (column // 2) + 2 * tile + column % 2
    return channel * 32 + 2 * (8 * step + 4 * register + t) + element


@cache
def _second_order() -> Tensor:
    """Where each packed number comes from in [64, 9, 64], flat: int64 of shape ``SECOND_PACKED``."""
    group, step, lane, number = torch.meshgrid(*(torch.arange(size) for size in SECOND_PACKED), indexing="ij")
    tile, register, element = number // 4, number // 2 % 2, number % 2
    column, t = lane // 4, lane % 4
    channel = 16 * group + 4 * (column // 2) + 2 * tile + column % 2
    return channel * (TAPS * CHANNELS) + 16 * step + 8 * register + 2 * t + element


torch.library.define(
    f"{NAMESPACE}::convolution_double_stem",
    "(Tensor x, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, int[] config, Tensor? mean=None, "
    "Tensor? scale=None) -> Tensor",
)


@torch.library.register_fake(f"{NAMESPACE}::convolution_double_stem")
def _fake(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    config: Sequence[int],
    mean: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    return first.new_empty((*made_size(x), CHANNELS))
