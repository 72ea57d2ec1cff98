"""Weights of a convolution in the order in which the kernel reads them, laid out once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvolutionWeights(NamedTuple):
    """What a convolution is made of; see :func:`lay_out`.

    Attributes:
        weight: [O, R, S, C], contiguous.
        bias: float32 [O], that of the second convolution added.
        stride, padding: in both directions.
        second_weight: [O, 1, 1, C2] of a second input's 1 x 1 convolution, or None.
        second_stride: of that one.
    """

    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    second_weight: Tensor | None = None
    second_stride: int = 1


def problem(weight: Tensor, stride: int, padding: int) -> str | None:
    """Why the kernel cannot take a weight [O, C, R, S] with this stride and padding, or None."""
    outputs, channels, down, across = weight.shape
    if outputs % 16 or channels % 16 or not weight.numel():
        return f"weight must have multiples of 16 channels, got {channels} in and {outputs} out"
    if not 0 <= padding < min(down, across) or max(down, across) > 15:
        return f"padding must be at least 0 and less than the kernel's {down} x {across}, got {padding}"
    if not 1 <= stride <= 8:
        return f"stride must be 1 to 8, got {stride}"
    return None


def lay_out(
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int | None = None,
    second: tuple[Tensor, Tensor | None, int] | None = None,
) -> ConvolutionWeights:
    """Order the weights of a convolution.

    What lies in memory as the kernel reads it (weights in channels_last, a bias in float32) is shared, not copied, so
    that changes in place are seen.

    Args:
        weight: [O, C, R, S], as of ``nn.Conv2d``, R and S odd and at most 15, O and C multiples of 16.
        bias: [O].
        stride: 1 to 8.
        padding: less than R and S; (R - 1) / 2 by default, which needs R = S.
        second: weight [O, C2, 1, 1], bias [O] (None where `bias` holds both) and stride of a 1 x 1 convolution of a
            second input whose result is added to the first's: the downsampling branch of a residual block.

    Raises:
        ValueError: shapes that do not fit, or channels that are no multiples of 16.
    """
    if weight.dim() != 4 or bias.shape != weight.shape[:1]:
        raise ValueError(f"weight must be [O, C, R, S] and bias [O], got {list(weight.shape)} and {list(bias.shape)}")
    outputs, _, down, across = weight.shape
    if padding is None:
        padding = (down - 1) // 2
        if down != across or down % 2 == 0:
            raise ValueError(f"padding must be given for a kernel of {down} x {across}")
    if wrong := problem(weight, stride, padding):
        raise ValueError(wrong)
    ordered = weight.permute(0, 2, 3, 1).contiguous()
    if second is None:
        return ConvolutionWeights(ordered, bias.float().contiguous(), stride, padding)
    more, more_bias, more_stride = second
    if more.dim() != 4 or more.shape[0] != outputs or more.shape[2:] != (1, 1) or more.shape[1] % 16:
        raise ValueError(f"second must be a 1 x 1 convolution to {outputs} channels, got weights {list(more.shape)}")
    if not 1 <= more_stride <= 8:
        raise ValueError(f"second must have a stride of 1 to 8, got {more_stride}")
    total = bias if more_bias is None else bias.double() + more_bias.double()
    more = more.permute(0, 2, 3, 1).contiguous().to(weight.dtype)
    return ConvolutionWeights(ordered, total.float().contiguous(), stride, padding, more, more_stride)


def as_conv2d(weight: Tensor) -> Tensor:
    """[O, R, S, C] as ``conv2d`` takes it: [O, C, R, S] in channels_last, a view."""
    return weight.permute(0, 3, 1, 2)
