"""ResNet's beginning in one kernel: 7 x 7 convolution of stride 2, bias, ReLU, 3 x 3 max pooling of stride 2."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution.ops import NAMESPACE
from fastmetro_kernels.fused.inference import check_tensor, refuse_gradients

CHANNELS, STEPS, PAIRS = 64, 10, 11
"""Of the output; of 16 numbers of the depth; of numbers of a row of taps, the last with a weight of zero. As in
``csrc/convolution/stem.cuh``."""
_WEIGHT = (CHANNELS, 3, 7, 7)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StemWeights(NamedTuple):
    """What the stem is made of; see :func:`lay_out_stem`.

    Attributes:
        weight: [64, 3, 7, 7], as of ``nn.Conv2d``.
        bias: float32 [64].
        packed: [2, 10, 32, 16] of the dtype of ``weight``, as the kernel's warps read it: :func:`pack_stem` of it.
    """

    weight: Tensor
    bias: Tensor
    packed: Tensor


def pack_stem(weight: Tensor) -> Tensor:
    """The weights in the order of the kernel's registers.

    Args:
        weight: [64, 3, 7, 7].

    Returns:
        [2 halves of the channels, 10 steps of the depth, 32 lanes, 16 numbers]. The depth is 7 rows of taps, each of 7
        pixels x 3 channels and a zero, and 6 zeros. Of a step lane l has, for each of four times eight channels,
        numbers 2 (l % 4), the next, and the two that come 8 later, of channel l / 4 (fragments of PTX's
        ``mma.m16n8k16``).

    Raises:
        ValueError: another shape.
    """
    if weight.shape != _WEIGHT:
        raise ValueError(f"weight must be {list(_WEIGHT)}, got {list(weight.shape)}")
    rows = F.pad(weight.permute(0, 2, 3, 1).flatten(2), (0, 2 * PAIRS - 21))  # [64, 7, 22]
    depth = F.pad(rows.flatten(1), (0, 16 * STEPS - 14 * PAIRS))  # [64, 160]
    # [half, eight, channel, step, which 8, pair, number of the pair]
    parts = depth.view(2, 4, 8, STEPS, 2, 4, 2)
    return parts.permute(0, 3, 2, 5, 1, 4, 6).reshape(2, STEPS, 32, 16).contiguous()


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


def convolution_stem(x: Tensor, weights: StemWeights, *, early: bool = True, backend: str = "auto") -> Tensor:
    """``max_pool(relu(conv(x) + bias))`` of channels_last images, for inference; pixels must be finite.

    Sums are in float32 and rounded once. What is not finite also reaches the position to the left of those that see it.

    Args:
        x: ``[N, 3, H, W]`` float16 or bfloat16 (reference: any floating point type); other orders than channels_last
            are copied.
        weights: of :func:`lay_out_stem`, of the dtype and device of x.
        early: whether to start before the kernel in front has ended (native, compute capability 9.0).
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``[N, 64, P, Q]`` in the dtype of x, channels_last; P = ceil(ceil(H / 2) / 2), Q likewise.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not fit; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    check_tensor("x", x, _DTYPES)
    if not isinstance(weights, StemWeights):
        raise TypeError(f"weights must come from lay_out_stem, got {type(weights).__name__}")
    check_tensor("weights.weight", weights.weight, (x.dtype,), x.device)
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
        raise ValueError(f"x must be [N, 3, H, W], got {list(x.shape)}")
    refuse_gradients("convolution_stem", {"x": x, "weight": weights.weight})
    choices = {"reference": [], "native": stem_reasons(x.device, x.dtype)}
    if backends.select("convolution_stem", backend, choices, ("native", "reference")) == "reference":
        return _reference(x, weights)
    rows = x.permute(0, 2, 3, 1).contiguous()
    out = torch.ops.fastmetro_kernels.convolution_stem(rows, weights.packed, weights.bias, early)
    return out.permute(0, 3, 1, 2)


def stem_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the extension cannot take inputs of this device and dtype; empty when it can."""
    if device.type != "cuda":
        return ["runs on CUDA devices only"]
    found = list(backends.native_cuda_reasons())
    if dtype not in (torch.float16, torch.bfloat16):
        found.append(f"takes float16 and bfloat16, got {dtype}")
    return found


def _reference(x: Tensor, weights: StemWeights) -> Tensor:
    weight = weights.weight.to(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, weights.bias.to(x.dtype), 2, 3).relu_()
    return F.max_pool2d(y, 3, 2, 1).to(memory_format=torch.channels_last)


torch.library.define(f"{NAMESPACE}::convolution_stem", "(Tensor x, Tensor weight, Tensor bias, bool early) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::convolution_stem")
def _fake(x: Tensor, weight: Tensor, bias: Tensor, early: bool) -> Tensor:
    torch._check(x.dim() == 4 and x.size(3) == 3, lambda: "x must be [N, H, W, 3]")
    height, width = (((size + 1) // 2 + 1) // 2 for size in x.shape[1:3])
    return x.new_empty((x.size(0), height, width, CHANNELS))
