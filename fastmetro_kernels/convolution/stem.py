"""ResNet's beginning in one kernel: 7 x 7 convolution of stride 2, bias, ReLU, 3 x 3 max pooling of stride 2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution.ops import NAMESPACE
from fastmetro_kernels.convolution.stem_images import (
    INPUTS,
    check_images,
    image_size,
    kernel_images,
    made_size,
    own_images,
)
from fastmetro_kernels.fused.inference import refuse_gradients

CHANNELS, TAPS = 64, 7
PACKED = (2, 10, 2, 32, 8)
"""Half of the channels, step of 16 numbers of the depth, two tiles of 8 channels, lane, what it loads at once. As in
``csrc/convolution/stem.cuh``."""
_NUMBERS = 22  # of a row of taps in the kernel: one under a weight of 0, then 7 pixels of 3 channels
_NEAR = 14  # slots of a lane that hold pairs of all rows of taps; the others hold the last pairs of two rows
_WEIGHT = (CHANNELS, INPUTS, TAPS, TAPS)


class StemConfig(NamedTuple):
    """How the stem is cut.

    Attributes:
        height, width: pooled positions of a tile.
        early: whether to start before the kernel in front has ended (compute capability 9.0).
        warpgroups: whether products are those of warpgroups (compute capability 9.0; ``stem_hopper.cuh``).
    """

    height: int
    width: int
    early: bool = True
    warpgroups: bool = False


_CONFIGS = tuple(StemConfig(height, width) for height, width in ((7, 8), (4, 8), (7, 4), (4, 4)))
_OF_WARPGROUPS = StemConfig(7, 8, warpgroups=True)


class StemWeights(NamedTuple):
    """What the stem is made of; see :func:`lay_out_stem`.

    Attributes:
        weight: [64, 3, 7, 7], as of ``nn.Conv2d``.
        bias: float32 [64].
        packed: [2, 10, 2, 32, 8] of the dtype of ``weight``, as the kernel's lanes load it: :func:`pack_stem` of it.
    """

    weight: Tensor
    bias: Tensor
    packed: Tensor


def stem_configs(warpgroups: bool = False) -> tuple[StemConfig, ...]:
    """All tiles there are, the largest first; with or without the one of compute capability 9.0 alone."""
    return (_OF_WARPGROUPS, *_CONFIGS) if warpgroups else _CONFIGS


def choose_stem(
    images: int, height: int, width: int, multiprocessors: int = 132, warpgroups: bool = False
) -> StemConfig:
    """The largest tile of which there are enough for all multiprocessors, else the smallest.

    On an H200 this is the fastest tile for 8, 32 and 256 images of 224 x 224, and within 6 % of it for one
    (``bench/results/convolution_variants_h200.json``).

    Args:
        images, height, width: of the output.
        multiprocessors: of the device.
        warpgroups: whether the device has their products.
    """
    for config in stem_configs(warpgroups):
        if images * -(-height // config.height) * -(-width // config.width) >= multiprocessors:
            return config
    return _CONFIGS[-1]


def pack_stem(weight: Tensor) -> Tensor:
    """The weights in the order of the kernel's registers.

    Args:
        weight: [64, 3, 7, 7].

    Returns:
        [2, 10, 2, 32, 8], contiguous: half of the channels, step of the depth, two tiles of 8 channels, lane, number.
        The depth is 8 rows of taps, the last of zeros, each of a zero and 7 pixels x 3 channels.

    Raises:
        ValueError: another shape.
    """
    if weight.shape != _WEIGHT:
        raise ValueError(f"weight must be {list(_WEIGHT)}, got {list(weight.shape)}")
    rows = weight.permute(0, 2, 3, 1).reshape(CHANNELS, TAPS, TAPS * INPUTS)
    return F.pad(rows, (1, 0, 0, 1)).flatten()[_order(weight.device)]


def lay_out_stem(weight: Tensor, bias: Tensor) -> StemWeights:
    """Order the stem's weights.

    Args:
        weight: [64, 3, 7, 7], as of ``nn.Conv2d``.
        bias: [64].

    Raises:
        ValueError: another shape.
    """
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    return StemWeights(weight, bias.float().contiguous(), pack_stem(weight))


def convolution_stem(
    x: Tensor,
    weights: StemWeights,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    pooled: bool = True,
    config: StemConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """``max_pool(relu(conv(x) + bias))`` of images, for inference; pixels must be finite.

    Sums are in float32 and rounded once; equal calls give equal bits. Images as they come give the bits of those that
    were brought to the dtype of the weights before; padding is 0 in what the convolution takes. A pixel that is not
    finite also reaches outputs beside those whose windows hold it.

    Args:
        x: ``[N, 3, H, W]`` of the dtype of the weights; other orders than channels_last are copied. Or as images come:
            float32 ``[N, 3, H, W]``, rounded to that dtype (other orders than the usual one are copied), or uint8
            ``[N, H, W, 3]``, of which ``(x - mean) * scale`` is taken, in float32 and rounded once.
        weights: of :func:`lay_out_stem`, float16 or bfloat16 (reference: float32 and float64, too), on the device
            of x.
        mean, scale: float32 ``[3]`` on the device of x, for uint8 images.
        pooled: whether ReLU and pooling follow; else it is ``conv(x) + bias``, for a batch norm that follows in
            training (autograd does not see it).
        config: one of ``stem_configs(True)`` (native), with or without ``early``; default: :func:`choose_stem`.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``[N, 64, P, Q]`` in the dtype of the weights, channels_last; P = ceil(H / 4), ceil(H / 2) if not pooled, Q
        likewise.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not fit; a config that is none; uint8 images without mean and scale, or
            others with them; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    _check(x, weights, config, mean, scale)
    refuse_gradients("convolution_stem", {"x": x, "weight": weights.weight, "mean": mean, "scale": scale})
    dtype = weights.weight.dtype
    choices = {"reference": [], "native": stem_reasons(x.device, dtype)}
    if backends.select("convolution_stem", backend, choices, ("native", "reference")) == "reference":
        return _reference(own_images(x, dtype, mean, scale), weights, pooled)
    if config is None:
        height, width = image_size(x)
        config = choose_stem(x.shape[0], -(-height // 4), -(-width // 4), warpgroups=has_warpgroups(x.device))
    numbers = list(map(int, config))
    if mean is not None and scale is not None:
        mean, scale = mean.contiguous(), scale.contiguous()
    images = kernel_images(x, dtype)
    given = images, weights.packed, weights.bias, numbers, mean, scale, pooled
    out = torch.ops.fastmetro_kernels.convolution_stem(*given)
    return out.permute(0, 3, 1, 2)


def stem_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the extension cannot take weights of this dtype on this device; empty when it can."""
    if device.type != "cuda":
        return ["runs on CUDA devices only"]
    found = list(backends.native_cuda_reasons())
    if dtype not in (torch.float16, torch.bfloat16):
        found.append(f"takes float16 and bfloat16, got {dtype}")
    return found


@cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether a CUDA device has the products of warpgroups, which compute capability 9.0 alone has."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _reference(x: Tensor, weights: StemWeights, pooled: bool) -> Tensor:
    weight = weights.weight.to(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, weights.bias.to(x.dtype), 2, 3)
    return (F.max_pool2d(y.relu_(), 3, 2, 1) if pooled else y).to(memory_format=torch.channels_last)


def _check(
    x: Tensor, weights: StemWeights, config: StemConfig | None, mean: Tensor | None, scale: Tensor | None
) -> None:
    if not isinstance(weights, StemWeights):
        raise TypeError(f"weights must come from lay_out_stem, got {type(weights).__name__}")
    check_images(x, weights.weight, "weights.weight", mean, scale)
    if config is not None and config._replace(early=True) not in stem_configs(warpgroups=True):
        sizes = ", ".join(f"{one.height} x {one.width}" for one in _CONFIGS)
        raise ValueError(f"config must be a tile of {sizes}, or of 7 x 8 with warpgroups, got {tuple(config)}")


@cache
def _order(device: torch.device) -> Tensor:
    """Where each packed number comes from in [64, 8 rows of taps, 22 numbers], flat: int64 of shape ``PACKED``.

    A lane of tensor cores has, of each of 20 slots (register b of step s is slot 2 s + b), two numbers that lie side by
    side; t = lane % 4 tells which.
    """
    half, step, two, lane, number = torch.meshgrid(*(torch.arange(size) for size in PACKED), indexing="ij")
    tile, register, element = 2 * two + number // 4, number // 2 % 2, number % 2
    column, t = lane // 4, lane % 4
    channel = 32 * half + 8 * (column // 2) + 2 * tile + column % 2
    slot = 2 * step + register
    late = (slot - _NEAR).clamp(min=0)
    row = torch.where(slot < _NEAR, slot // 2, late // 3 * 4 + t)
    pair = torch.where(slot < _NEAR, slot % 2 * 4 + t, 8 + late % 3)
    return ((channel * (TAPS + 1) + row) * _NUMBERS + 2 * pair + element).to(device)


# `x` is [N, H, W, 3] of the type of the weights, float32 [N, 3, H, W], or uint8 [N, H, W, 3] with `mean` and `scale`.
torch.library.define(
    f"{NAMESPACE}::convolution_stem",
    "(Tensor x, Tensor weight, Tensor bias, int[] config, Tensor? mean=None, Tensor? scale=None, "
    "bool pooled=True) -> Tensor",
)


@torch.library.register_fake(f"{NAMESPACE}::convolution_stem")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: Sequence[int],
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    pooled: bool = True,
) -> Tensor:
    return weight.new_empty((*made_size(x, pooled), CHANNELS))
