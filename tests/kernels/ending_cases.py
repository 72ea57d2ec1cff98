"""What the tests of a block's end share: arguments of the op, what is right, and a stand-in for the kernel on CPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fused_cases import assert_within_budget
from torch import Tensor

from fastmetro_kernels.convolution import ConvolutionWeights, convolution_ending, lay_out
from fastmetro_kernels.convolution.ending_configs import FOLLOWING, JOINED
from fastmetro_kernels.convolution.layout import as_conv2d


class Call(NamedTuple):
    """Arguments of the op, in their order."""

    x: Tensor
    weights: ConvolutionWeights
    last: ConvolutionWeights
    following: ConvolutionWeights | None
    residual: Tensor | None
    second: Tensor | None

    def of(self, images: slice) -> Call:
        kept = [None if one is None else one[images] for one in (self.residual, self.second)]
        return Call(self.x[images], *self[1:4], *kept)


def guarded(x: Tensor) -> Tensor:
    """A copy in the same order of memory, with NaN in front and behind."""
    room = torch.full((x.numel() + 512,), torch.nan, dtype=x.dtype, device=x.device)
    return room[256 : 256 + x.numel()].as_strided(x.shape, x.stride(), 256).copy_(x)


def make(size: tuple[int, int, int], mode: str, device: str, dtype: torch.dtype, seed: int = 0) -> Call:
    generator = torch.Generator(device).manual_seed(seed + sum(size))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        made = (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)
        return guarded(made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made)

    images, *place = size
    weights = lay_out(normal(64, 64, 3, 3, scale=1 / 24), normal(64))
    branch = (normal(256, 64, 1, 1, scale=1 / 8), None, 1) if mode == JOINED else None
    last = lay_out(normal(256, 64, 1, 1, scale=1 / 8), normal(256), second=branch)
    outputs = FOLLOWING[mode]
    following = lay_out(normal(outputs, 256, 1, 1, scale=1 / 16), normal(outputs)) if outputs else None
    shortcut = normal(images, 64 if mode == JOINED else 256, *place)
    others = (None, shortcut) if mode == JOINED else (shortcut, None)
    return Call(normal(images, 64, *place), weights, last, following, *others)


def exact(call: Call) -> list[Tensor]:
    """Wide, and narrow if there is one, in float64 without a rounding between."""

    def layer(x: Tensor, one: ConvolutionWeights) -> Tensor:
        return F.conv2d(x, as_conv2d(one.weight).double(), one.bias.double(), padding=one.padding)

    y = layer(layer(call.x.double(), call.weights).relu(), call.last)
    if call.residual is not None:
        y = y + call.residual.double()
    if call.second is not None and call.last.second_weight is not None:
        y = y + F.conv2d(call.second.double(), as_conv2d(call.last.second_weight).double())
    y = y.relu()
    return [y] if call.following is None else [y, layer(y, call.following).relu()]


def results(found: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    return [one for one in found if one is not None]


def check(found: tuple[Tensor, Tensor | None], call: Call) -> None:
    """In channels_last; each number, and all together, about as near to float64 as plain PyTorch is in that dtype."""
    wants, plains = exact(call), results(convolution_ending(*call, backend="reference"))
    assert (found[1] is None) == (call.following is None)
    for got, want, plain in zip(results(found), wants, plains, strict=True):
        assert got.dtype == call.x.dtype and got.is_contiguous(memory_format=torch.channels_last)
        rounding = torch.finfo(got.dtype).eps * want.abs() + 1e-6
        assert_within_budget(*(one.permute(0, 2, 3, 1) for one in (got, want, plain, rounding)))
        error, allowed = (float((one.double() - want).norm()) for one in (got, plain))
        assert error <= 1.5 * allowed + 1e-6, f"error {error:.3g}, plain PyTorch {allowed:.3g}"


def pretend(
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
    config: list[int],
) -> tuple[Tensor, Tensor]:
    """What the native op is to compute: sums in float32, rounded once each."""
    assert all(one is None or one.is_contiguous() for one in (x, residual, second)) and config in ([0], [1])

    def layer(rows: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
        y = F.conv2d(rows.permute(0, 3, 1, 2).float(), as_conv2d(weight).float(), bias, padding=padding)
        return y.permute(0, 2, 3, 1)

    middle = layer(x, weight, bias, 1).relu().to(x.dtype)
    sums = layer(middle, last_weight, last_bias)
    if residual is not None:
        sums = sums + residual.float()
    if second is not None and second_weight is not None:
        sums = sums + layer(second, second_weight, None)
    wide = sums.relu().to(x.dtype).contiguous()
    if next_weight is None:
        return wide, wide.new_empty((*x.shape[:3], 0))
    return wide, layer(wide, next_weight, next_bias).relu().to(x.dtype).contiguous()


def op_arguments(call: Call) -> tuple[Any, ...]:
    """Of the native op."""
    rows = [None if one is None else one.permute(0, 2, 3, 1) for one in (call.x, call.residual, call.second)]
    behind = (None, None) if call.following is None else (call.following.weight, call.following.bias)
    both = (call.weights.weight, call.weights.bias, call.last.weight, call.last.bias)
    return (rows[0], *both, *rows[1:], call.last.second_weight, *behind, [1])
