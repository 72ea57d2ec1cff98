"""The end of a bottleneck residual block in one kernel: what is behind its first convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.convolution import reference
from fastmetro_kernels.convolution.api import channels_last_rows, layer_of
from fastmetro_kernels.convolution.ending_configs import FOLLOWING, JOINED, MODES, WIDENED, is_measured
from fastmetro_kernels.convolution.layout import ConvolutionWeights
from fastmetro_kernels.convolution.ops import NAMESPACE
from fastmetro_kernels.fused.inference import check_tensor, refuse_gradients

OPERATOR = "convolution_ending_native"
NARROW, WIDE = 64, 256
"""Channels between the convolutions of a block, and of blocks."""
_SHAPES = {"weights": (NARROW, 3, 3, NARROW), "last": (WIDE, 1, 1, NARROW), "following": (NARROW, 1, 1, WIDE)}
_MODES = {FOLLOWING[mode]: mode for mode in MODES if mode != JOINED}


def convolution_ending(
    x: Tensor,
    weights: ConvolutionWeights,
    last: ConvolutionWeights,
    following: ConvolutionWeights | None = None,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    *,
    early: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The last two convolutions of a bottleneck block, and the first of the next block, for inference.

    ``middle = relu(conv_3x3(x) + bias)``, ``wide = relu(conv_1x1(middle) + conv_1x1(second) + bias + residual)`` and
    ``narrow = relu(conv_1x1(wide) + bias)`` of channels_last images. Sums are in float32; middle and wide are read as
    they are rounded. The order of additions is fixed: the same bits in every run. The kernel reads weights before the
    kernel in front of it has ended (see ``early``), which must not write them.

    Args:
        x: ``[N, 64, H, W]`` float16 or bfloat16 (reference: any floating point type); other orders than channels_last
            are copied.
        weights: of :func:`lay_out`, of the dtype and device of x: 3 x 3 of stride 1 and padding 1, to 64 channels.
        last: 1 x 1 of stride 1 from 64 to 256 channels, where ``second`` is given with a second convolution alike.
        following: 1 x 1 of stride 1 from 256 to 64 channels; with a residual it may be to 128, or left out.
        residual: ``[N, 256, H, W]``, the shortcut; given if, and only if, ``second`` is not.
        second: ``[N, 64, H, W]``, input of the second convolution of ``last``, if it has one.
        early: whether the kernel starts before the kernel in front has ended (native).
        backend: ``"auto"`` (native where that was measured to be faster, see :func:`choose_ending`, else the
            reference), ``"native"`` or ``"reference"``.

    Returns:
        ``wide [N, 256, H, W]`` and ``narrow [N, 64, H, W]``, or None without ``following``, in the dtype of x,
        channels_last.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or weights that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    chosen = choose_ending(x, weights, last, following, residual, second)
    if not isinstance(early, bool):
        raise TypeError(f"early must be True or False, got {early!r}")
    named = {"x": x, "residual": residual, "second": second, "last.second_weight": last.second_weight}
    for name, one in _named(weights, last, following).items():
        named |= {f"{name}.weight": one.weight, f"{name}.bias": one.bias}
    refuse_gradients("convolution_ending", named)
    choices = {"reference": [], "native": ending_reasons(x.device, x.dtype)}
    order = ("native", "reference") if chosen else ("reference",)
    if backends.select("convolution_ending", backend, choices, order) == "reference":
        return _reference(x, weights, last, following, residual, second)
    moved = [None if tensor is None else channels_last_rows(tensor) for tensor in (residual, second)]
    next_weight, next_bias = (None, None) if following is None else (following.weight, following.bias)
    wide, narrow = torch.ops.fastmetro_kernels.convolution_ending_native(
        channels_last_rows(x), weights.weight, weights.bias, last.weight, last.bias, *moved, last.second_weight,
        next_weight, next_bias, [int(early)],
    )  # fmt: skip
    return wide.permute(0, 3, 1, 2), None if following is None else narrow.permute(0, 3, 1, 2)


def choose_ending(
    x: Tensor,
    weights: ConvolutionWeights,
    last: ConvolutionWeights,
    following: ConvolutionWeights | None = None,
    residual: Tensor | None = None,
    second: Tensor | None = None,
) -> bool:
    """Whether the kernel can take this and was measured to be faster than the kernels whose place it takes.

    Args, Raises: as of :func:`convolution_ending`.
    """
    mode = _checked_mode(x, weights, last, following, residual, second)
    images, _, height, width = x.shape
    return not ending_reasons(x.device, x.dtype) and is_measured(images, height, width, mode)


def ending_problem(
    weights: ConvolutionWeights, last: ConvolutionWeights, following: ConvolutionWeights | None = None
) -> str | None:
    """What keeps convolutions from being for this kernel, or None."""
    for name, one in _named(weights, last, following).items():
        shape, padding = _SHAPES[name], int(name == "weights")
        if name == "following" and one.weight.shape[0] == FOLLOWING[WIDENED] and last.second_weight is None:
            shape = (FOLLOWING[WIDENED], *shape[1:])
        if (tuple(one.weight.shape), one.stride, one.padding) != (shape, 1, padding):
            given = f"{list(one.weight.shape)} of stride {one.stride} and padding {one.padding}"
            return f"{name} must be {list(shape)} of stride 1 and padding {padding}, got {given}"
        if name != "last" and one.second_weight is not None:
            return f"{name} must have no second convolution"
    if last.second_weight is None:
        return None
    if (tuple(last.second_weight.shape), last.second_stride) != (_SHAPES["last"], 1):
        given = f"{list(last.second_weight.shape)} of stride {last.second_stride}"
        return f"last must have a second convolution of {list(_SHAPES['last'])} and stride 1, got {given}"
    return None if following is not None else "following must be given where last has a second convolution"


def ending_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the extension cannot take inputs of this device and dtype; empty when it can."""
    return backends.hopper_reasons(OPERATOR, device, dtype)


def _named(
    weights: ConvolutionWeights, last: ConvolutionWeights, following: ConvolutionWeights | None
) -> dict[str, ConvolutionWeights]:
    """Those that are given, by the names of the arguments."""
    named = {"weights": weights, "last": last}
    return named if following is None else named | {"following": following}


def _checked_mode(
    x: Tensor,
    weights: ConvolutionWeights,
    last: ConvolutionWeights,
    following: ConvolutionWeights | None,
    residual: Tensor | None,
    second: Tensor | None,
) -> str:
    """Which of the modes a call is, once its arguments are checked; see :func:`convolution_ending`."""
    named = _named(weights, last, following)
    for name, one in named.items():
        if not isinstance(one, ConvolutionWeights):
            raise TypeError(f"{name} must come from lay_out, got {type(one).__name__}")
    if wrong := ending_problem(weights, last, following):
        raise ValueError(wrong)
    layer_of(x, weights, None, None)
    for name, one in named.items():
        check_tensor(f"{name}.weight", one.weight, (x.dtype,), x.device)
    if last.second_weight is not None:
        check_tensor("last.second_weight", last.second_weight, (x.dtype,), x.device)
    if (residual is None) == (last.second_weight is None):
        raise ValueError("residual must be given if, and only if, last has no second convolution")
    layer_of(x, last, residual, second)  # what lies between has the shape of x
    return JOINED if residual is None else _MODES[0 if following is None else following.weight.shape[0]]


def _reference(
    x: Tensor,
    weights: ConvolutionWeights,
    last: ConvolutionWeights,
    following: ConvolutionWeights | None,
    residual: Tensor | None,
    second: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One convolution after the other."""
    middle = reference.convolution(x, weights, None, None, True)
    wide = reference.convolution(middle, last, residual, second, True).contiguous(memory_format=torch.channels_last)
    if following is None:
        return wide, None
    narrow = reference.convolution(wide, following, None, None, True)
    return wide, narrow.contiguous(memory_format=torch.channels_last)


# Images are [N, H, W, C], contiguous. `config`: whether to start before the kernel in front has ended. Returns wide
# [N, H, W, 256] and narrow [N, H, W, 64], or [N, H, W, 0] without `next_weight`.
torch.library.define(
    f"{NAMESPACE}::{OPERATOR}",
    "(Tensor x, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias, Tensor? residual, Tensor? second, "
    "Tensor? second_weight, Tensor? next_weight, Tensor? next_bias, int[] config) -> (Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::{OPERATOR}")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    residual: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 4, lambda: f"x must be [N, H, W, {NARROW}], got {x.dim()} dimensions")
    outside = tuple(x.shape[:3])
    outputs = 0 if next_weight is None else next_weight.size(0)
    torch._check(
        outputs == 0 or outputs == NARROW or (outputs == 2 * NARROW and second is None),  # may be symbols
        lambda: f"next_weight must have {NARROW} outputs, or {2 * NARROW} with a residual, got {outputs}",
    )
    follows = next_weight is not None
    torch._check(
        follows == (next_bias is not None) and (follows or residual is not None),
        lambda: "next_weight and next_bias go together, and second needs them",
    )
    for name, tensor, expected in (
        ("x", x, (*outside, NARROW)),
        ("weight", weight, (NARROW, 3, 3, NARROW)),
        ("bias", bias, (NARROW,)),
        ("last_weight", last_weight, (WIDE, 1, 1, NARROW)),
        ("last_bias", last_bias, (WIDE,)),
        ("residual", residual, (*outside, WIDE)),
        ("second", second, (*outside, NARROW)),
        ("second_weight", second_weight, (WIDE, 1, 1, NARROW)),
        ("next_weight", next_weight, (outputs, 1, 1, WIDE)),
        ("next_bias", next_bias, (outputs,)),
    ):
        if tensor is not None:
            given = tuple(tensor.shape)
            torch._check(
                given == expected, lambda name=name, want=expected, given=given: f"{name} must be {want}, got {given}"
            )
    alike = (second is None) == (second_weight is None) == (residual is not None)
    torch._check(alike, lambda: "either residual or second with second_weight must be given")
    torch._check(len(config) == 1, lambda: f"config must hold early, got {list(config)}")
    return x.new_empty((*outside, WIDE)), x.new_empty((*outside, outputs))
