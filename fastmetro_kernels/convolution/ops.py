"""Schema and shape rule of the convolution op; ``csrc/convolution/`` implements it for CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMESPACE = "fastmetro_kernels"

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? second, Tensor? second_weight, int stride, "
    "int padding, int second_stride, bool relu, bool late"
)
torch.library.define(f"{NAMESPACE}::convolution_native", f"({_ARGUMENTS}, int scale, int[] config) -> Tensor")
torch.library.define(f"{NAMESPACE}::convolution_timeline_native", f"({_ARGUMENTS}, int[] config) -> (Tensor, Tensor)")

STAMPS = ("started", "prepared", "waited", "asked", "multiplied", "exchanged", "stored", "multiprocessor")
"""What a block of `convolution_timeline_native` notes, as in ``csrc/convolution/tile.cuh``."""


@torch.library.register_fake(f"{NAMESPACE}::convolution_native")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    stride: int,
    padding: int,
    second_stride: int,
    relu: bool,
    late: bool,
    scale: int,
    config: Sequence[int],
) -> Tensor:
    torch._check(x.dim() == 4 and weight.dim() == 4, lambda: "x must be [N, H, W, C] and weight [O, R, S, C]")
    torch._check(x.size(3) == weight.size(3), lambda: "x and weight must have the same channels")
    height = (x.size(1) + 2 * padding - weight.size(1)) // stride + 1
    width = (x.size(2) + 2 * padding - weight.size(2)) // stride + 1
    return x.new_empty((x.size(0), height * scale, width * scale, weight.size(0)))


def convolution_native(*arguments: object) -> Tensor:
    """See ``csrc/convolution/convolution.cu``: x [N, H, W, C] -> [N, P scale, Q scale, O]."""
    return torch.ops.fastmetro_kernels.convolution_native(*arguments)


def convolution_timeline_native(*arguments: object) -> tuple[Tensor, Tensor]:
    """The same of float16 images, without a scale, and int64 [blocks, `STAMPS`]: when each block did what.

    In clocks of its multiprocessor; the last number is which one that was.
    """
    return torch.ops.fastmetro_kernels.convolution_timeline_native(*arguments)
