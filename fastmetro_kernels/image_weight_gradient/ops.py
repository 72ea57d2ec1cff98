"""Schema and shape rules of the op; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.image_weight_gradient.plan import ImageWeightGradientConfig, problem, unfit
from fastmetro_kernels.images import is_channels_last

NAMESPACE = "fastmetro_kernels"

# The gradient of a weight [O, C, kernel, kernel], in channels_last and the dtype of x. `config` is an
# ImageWeightGradientConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::image_weight_gradient_triton",
    "(Tensor x, Tensor grad, int kernel, int stride, int padding, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int, config: Sequence[int]) -> None:
    """All rules, in a form that tracing understands."""
    if config:
        fits = len(config) == 3
        found = problem(ImageWeightGradientConfig(*config)) if fits else f"three numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")
    for name, image in (("x", x), ("grad", grad)):
        torch._check(image.dim() == 4, lambda: f"{name} must be [B, C, H, W], got {tuple(image.shape)}")  # noqa: B023
        torch._check(is_channels_last(image), lambda: f"{name} must be contiguous in channels_last")  # noqa: B023
    torch._check(x.dtype != torch.float64, lambda: "image_weight_gradient_triton does not take float64")
    torch._check(grad.dtype == x.dtype, lambda: f"grad must be {x.dtype}, got {grad.dtype}")
    unfitting = unfit(int(grad.shape[1]), int(x.shape[1]), kernel)
    torch._check(unfitting is None, lambda: str(unfitting))
    size = tuple((x.size(axis) + 2 * padding - kernel) // stride + 1 for axis in (2, 3))
    fits = (grad.size(0) == x.size(0)) and (grad.size(2) == size[0]) and (grad.size(3) == size[1])
    torch._check(fits, lambda: f"grad must be [{x.size(0)}, O, {size[0]}, {size[1]}], got {tuple(grad.shape)}")


def empty_weight(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """Memory for the result."""
    shape = (grad.size(1), x.size(1), kernel, kernel)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake(f"{NAMESPACE}::image_weight_gradient_triton")
def _fake(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int, config: Sequence[int]) -> Tensor:
    check(x, grad, kernel, stride, padding, config)
    return empty_weight(x, grad, kernel)


def _run(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int, config: Sequence[int]) -> Tensor:
    from fastmetro_kernels.image_weight_gradient import triton

    return triton.weight_gradient(x, grad, kernel, stride, padding, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::image_weight_gradient_triton", _device, _run)

image_weight_gradient_triton = torch.ops.fastmetro_kernels.image_weight_gradient_triton.default
