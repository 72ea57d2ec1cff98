"""The images that a stem takes: of its own type, or as they come, float32 planes or bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.fused.inference import check_tensor
from fastmetro_kernels.fused.pixels import reference as pixels

INPUTS = 3
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of weights."""
_RAW = (torch.float32, torch.uint8)


def check_images(x: Tensor, weight: Tensor, name: str, mean: Tensor | None, scale: Tensor | None) -> None:
    """Images, and the constants of bytes, for weights of this name; see :func:`convolution_stem`."""
    check_tensor("x", x, (*DTYPES, torch.uint8))
    check_tensor(name, weight, DTYPES if x.dtype in _RAW else (x.dtype,), x.device)
    is_bytes = x.dtype == torch.uint8
    if x.dim() != 4 or x.shape[3 if is_bytes else 1] != INPUTS or 0 in image_size(x):
        expected = "[N, H, W, 3] of uint8" if is_bytes else "[N, 3, H, W]"
        raise ValueError(f"x must be {expected}, got {list(x.shape)}")
    for constant, given in (("mean", mean), ("scale", scale)):
        if not is_bytes and given is not None:
            raise ValueError(f"{constant} is for uint8 images, got x of {x.dtype}")
        if is_bytes and given is None:
            raise ValueError(f"{constant} must be given for uint8 images: float32 [3]")
        if given is not None:
            check_tensor(constant, given, (torch.float32,), x.device)
            if given.shape != (INPUTS,):
                raise ValueError(f"{constant} must be [3], one number for each channel, got {list(given.shape)}")


def image_size(x: Tensor) -> tuple[int, int]:
    """Height and width of ``[N, 3, H, W]``, or of bytes ``[N, H, W, 3]``."""
    first = 1 if x.dtype == torch.uint8 else 2
    return x.shape[first], x.shape[first + 1]


def own_images(x: Tensor, dtype: torch.dtype, mean: Tensor | None, scale: Tensor | None) -> Tensor:
    """Checked images as ``[N, 3, H, W]`` of the weights' dtype, in channels_last order where they are copied."""
    if mean is not None and scale is not None:
        return pixels.normalize(x, mean, scale, dtype).permute(0, 3, 1, 2)
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.channels_last)


def kernel_images(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Checked images as the kernel reads them: bytes and float32 planes as they are, all others ``[N, H, W, 3]``."""
    if x.dtype == torch.uint8:
        return x.contiguous()
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    return x.to(dtype).permute(0, 2, 3, 1).contiguous()


def made_size(x: Tensor, pooled: bool = True) -> tuple[int, int, int]:
    """Number of images, height and width of what a stem makes of images as its op takes them, for fake tensors."""
    planes = x.dtype == torch.float32
    torch._check(
        x.dim() == 4 and x.size(1 if planes else 3) == INPUTS,
        lambda: f"x must be {'[N, 3, H, W]' if planes else '[N, H, W, 3]'}",
    )
    height, width = (x.size(2), x.size(3)) if planes else (x.size(1), x.size(2))
    part = 4 if pooled else 2
    return x.size(0), (height + part - 1) // part, (width + part - 1) // part
