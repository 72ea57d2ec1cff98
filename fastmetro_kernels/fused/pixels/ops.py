"""Schema and shape rules of the pixels' normalisation; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.fused.pixels.configs import PixelsConfig, problem

NAMESPACE = "fastmetro_kernels"
INPUTS = (torch.uint8, torch.float32)
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)

# `config` is a PixelsConfig, or empty for the pinned one. The result is contiguous [B, H, W, 3].
torch.library.define(
    f"{NAMESPACE}::normalize_pixels_triton",
    "(Tensor pixels, Tensor mean, Tensor scale, ScalarType dtype, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_constants(name: str, given: Tensor) -> None:
    fits = given.dtype == torch.float32 and given.dim() == 1 and given.size(0) == 3
    torch._check(fits, lambda: f"{name} must be float32 [3], got {given.dtype} {tuple(given.shape)}")


def check_arguments(pixels: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype, config: Sequence[int]) -> None:
    """Shape and dtype rules of the op, in a form that tracing understands."""
    torch._check(
        pixels.dim() == 4 and pixels.size(3) == 3, lambda: f"pixels must be [B, H, W, 3], got {tuple(pixels.shape)}"
    )
    torch._check(pixels.dtype in INPUTS, lambda: f"pixels must be uint8 or float32, got {pixels.dtype}")
    _check_constants("mean", mean)
    _check_constants("scale", scale)
    torch._check(dtype in OUTPUTS, lambda: f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if config:
        found = problem(PixelsConfig(*config)) if len(config) == 2 else f"two numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::normalize_pixels_triton")
def _fake(pixels: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype, config: Sequence[int]) -> Tensor:
    check_arguments(pixels, mean, scale, dtype, config)
    return pixels.new_empty(tuple(pixels.shape), dtype=dtype)


def _normalize_pixels_triton(
    pixels: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype, config: Sequence[int]
) -> Tensor:
    from fastmetro_kernels.fused.pixels import triton

    return triton.normalize(pixels, mean, scale, dtype, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::normalize_pixels_triton", _device, _normalize_pixels_triton)

normalize_pixels_triton = torch.ops.fastmetro_kernels.normalize_pixels_triton.default
