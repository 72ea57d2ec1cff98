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


def lay_out(
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int | None = None,
    second: tuple[Tensor, Tensor, int] | None = None,
) -> ConvolutionWeights:
    """Order the weights of a convolution.

    Args:
        weight: [O, C, R, S], as of ``nn.Conv2d``, R and S odd and at most 15, O and C multiples of 16.
        bias: [O].
        stride: 1 to 8.
        padding: less than R and S; (R - 1) / 2 by default, which needs R = S.
        second: weight [O, C2, 1, 1], bias [O] and stride of a 1 x 1 convolution of a second input whose result is added
            to the first's: the downsampling branch of a residual block.

    Raises:
        ValueError: shapes that do not fit, or channels that are no multiples of 16.
    """
    if weight.dim() != 4 or bias.shape != weight.shape[:1]:
        raise ValueError(f"weight must be [O, C, R, S] and bias [O], got {list(weight.shape)} and {list(bias.shape)}")
    outputs, channels, down, across = weight.shape
    if outputs % 16 or channels % 16 or not weight.numel():
        raise ValueError(f"weight must have multiples of 16 channels, got {channels} in and {outputs} out")
    if padding is None:
        padding = (down - 1) // 2
        if down != across or down % 2 == 0:
            raise ValueError(f"padding must be given for a kernel of {down} x {across}")
    if not 0 <= padding < min(down, across) or max(down, across) > 15:
        raise ValueError(f"padding must be at least 0 and less than the kernel's {down} x {across}, got {padding}")
    if not 1 <= stride <= 8:
        raise ValueError(f"stride must be 1 to 8, got {stride}")
    ordered = weight.permute(0, 2, 3, 1).contiguous()
    if second is None:
        return ConvolutionWeights(ordered, bias.float().contiguous(), stride, padding)
    more, more_bias, more_stride = second
    if more.dim() != 4 or more.shape[0] != outputs or more.shape[2:] != (1, 1) or more.shape[1] % 16:
        raise ValueError(f"second must be a 1 x 1 convolution to {outputs} channels, got weights {list(more.shape)}")
    if not 1 <= more_stride <= 8:
        raise ValueError(f"second must have a stride of 1 to 8, got {more_stride}")
    total = (bias.double() + more_bias.double()).float().contiguous()
    return ConvolutionWeights(ordered, total, stride, padding, more.permute(0, 2, 3, 1).contiguous().to(weight.dtype),
                              more_stride)  # fmt: skip


def output_size(height: int, width: int, weights: ConvolutionWeights) -> tuple[int, int]:
    """Height and width of the output for an input's."""
    _, down, across, _ = weights.weight.shape
    return (
        (height + 2 * weights.padding - down) // weights.stride + 1,
        (width + 2 * weights.padding - across) // weights.stride + 1,
    )


def as_conv2d(weight: Tensor) -> Tensor:
    """[O, R, S, C] as ``conv2d`` takes it: [O, C, R, S] in channels_last, a view."""
    return weight.permute(0, 3, 1, 2)
