"""Schemas and shape rules of the max pool's ops; ``triton.py``, imported by the first call, implements them.

They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.images import is_channels_last
from fastmetro_kernels.max_pool.plan import MaxPoolConfig, problem

NAMESPACE = "fastmetro_kernels"

# The maxima, and where in its window each was found: 3 * row + column, uint8. `config` is a MaxPoolConfig, or empty for
# the pinned one.
torch.library.define(
    f"{NAMESPACE}::max_pool_triton",
    "(Tensor x, int[] config) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of an x of this height and width, in the dtype of that of the maxima; `more` is added to the latter.
torch.library.define(
    f"{NAMESPACE}::max_pool_backward_triton",
    "(Tensor grad, Tensor? more, Tensor places, SymInt height, SymInt width, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def pooled(size: int) -> int:
    """Windows in a row of so many positions."""
    return (size + 1) // 2


def check_tile(config: Sequence[int]) -> None:
    """Of both ops."""
    if config:
        found = problem(MaxPoolConfig(*config)) if len(config) == 2 else f"two numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


def check_image(name: str, image: Tensor) -> None:
    """Axes, strides and dtype of what both ops take, in a form that tracing understands."""
    torch._check(image.dim() == 4, lambda: f"{name} must be [B, C, H, W], got {tuple(image.shape)}")
    torch._check(image.dtype != torch.float64, lambda: "max_pool_triton does not take float64")
    fits = is_channels_last(image)
    torch._check(fits, lambda: f"{name} must be contiguous in channels_last")


def check_backward(grad: Tensor, more: Tensor | None, places: Tensor, height: int, width: int) -> None:
    """All rules of the backward op."""
    check_image("grad", grad)
    for name, other, dtype in (("more", more, grad.dtype), ("places", places, torch.uint8)):
        if other is not None:
            check_image(name, other)
            torch._check(other.dtype == dtype, lambda: f"{name} must be {dtype}, got {other.dtype}")  # noqa: B023
            same = other.shape == grad.shape
            torch._check(same, lambda: f"{name} must be {tuple(grad.shape)}, got {tuple(other.shape)}")  # noqa: B023
    torch._check(pooled(height) == grad.size(2), lambda: f"grad must have {pooled(height)} rows, got {grad.size(2)}")
    torch._check(pooled(width) == grad.size(3), lambda: f"grad must have {pooled(width)} columns, got {grad.size(3)}")


def empty_image(like: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory in channels_last, with the batch and channels of another image."""
    shape = (like.size(0), like.size(1), height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_results(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what the forward op returns."""
    size = pooled(x.size(2)), pooled(x.size(3))
    return empty_image(x, *size), empty_image(x, *size, torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::max_pool_triton")
def _fake(x: Tensor, config: Sequence[int]) -> tuple[Tensor, Tensor]:
    check_tile(config)
    check_image("x", x)
    return empty_results(x)


@torch.library.register_fake(f"{NAMESPACE}::max_pool_backward_triton")
def _fake_backward(
    grad: Tensor, more: Tensor | None, places: Tensor, height: int, width: int, config: Sequence[int]
) -> Tensor:
    check_tile(config)
    check_backward(grad, more, places, height, width)
    return empty_image(grad, height, width)


def _forward(x: Tensor, config: Sequence[int]) -> tuple[Tensor, Tensor]:
    from fastmetro_kernels.max_pool import triton

    return triton.forward(x, config)


def _backward(
    grad: Tensor, more: Tensor | None, places: Tensor, height: int, width: int, config: Sequence[int]
) -> Tensor:
    from fastmetro_kernels.max_pool import triton

    return triton.backward(grad, more, places, height, width, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::max_pool_triton", _device, _forward)
    torch.library.impl(f"{NAMESPACE}::max_pool_backward_triton", _device, _backward)

max_pool_triton = torch.ops.fastmetro_kernels.max_pool_triton.default
max_pool_backward_triton = torch.ops.fastmetro_kernels.max_pool_backward_triton.default
