"""The Triton backend of the pixels' normalisation: CUDA devices, or CPU tensors in Triton's interpreter.

Numbers are read and written in the order in which they lie, many bytes at a time; the channel of a number is its
place modulo 3.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device
from fastmetro_kernels.fused.pixels import ops
from fastmetro_kernels.fused.pixels.configs import PixelsConfig, pinned


@triton.jit
def _normalized(x, place, mean_0, mean_1, mean_2, scale_0, scale_1, scale_2):
    """(x - mean) * scale in float32, with the constants of the three channels that places 0, 1 and 2 modulo 3 have."""
    mean = tl.where(place == 0, mean_0, tl.where(place == 1, mean_1, mean_2))
    scale = tl.where(place == 0, scale_0, tl.where(place == 1, scale_1, scale_2))
    return (x.to(tl.float32) - mean) * scale


@triton.jit
def normalize_pixels_kernel(pixels, mean, scale, out, numbers, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Three blocks of BLOCK consecutive numbers each, so that all programs begin with the same channel."""
    tl.static_assert(BLOCK % 3 == 1)
    start = tl.program_id(0).to(tl.int64) * (3 * BLOCK)  # there may be more than 2^31 numbers
    pixels += start
    out += start
    left = numbers - start
    first = tl.arange(0, BLOCK)
    second, third = first + BLOCK, first + 2 * BLOCK
    place = first % 3  # a division, the dearest of all here: once for three numbers
    await_earlier_kernels(EARLY)
    mean_0, mean_1, mean_2 = tl.load(mean), tl.load(mean + 1), tl.load(mean + 2)
    scale_0, scale_1, scale_2 = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    # All reads stand before the first write, which the compiler would not let them pass.
    x = tl.load(pixels + first, mask=first < left, other=0)
    y = tl.load(pixels + second, mask=second < left, other=0)
    z = tl.load(pixels + third, mask=third < left, other=0)
    # A block is one number longer than a multiple of three: the next one begins with the next channel.
    x = _normalized(x, place, mean_0, mean_1, mean_2, scale_0, scale_1, scale_2)
    y = _normalized(y, place, mean_1, mean_2, mean_0, scale_1, scale_2, scale_0)
    z = _normalized(z, place, mean_2, mean_0, mean_1, scale_2, scale_0, scale_1)
    tl.store(out + first, x.to(out.dtype.element_ty), mask=first < left)
    tl.store(out + second, y.to(out.dtype.element_ty), mask=second < left)
    tl.store(out + third, z.to(out.dtype.element_ty), mask=third < left)


def normalize(pixels: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype, config: Sequence[int]) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_arguments(pixels, mean, scale, dtype, config)
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    numbers = out.numel()
    if numbers == 0:
        return out
    tile = PixelsConfig(*config) if config else pinned(numbers)
    early = launches_early(pixels)
    with on_device(pixels):
        normalize_pixels_kernel[(triton.cdiv(numbers, 3 * tile.block),)](
            pixels.contiguous(), mean.contiguous(), scale.contiguous(), out, numbers,
            BLOCK=tile.block, EARLY=early, num_warps=tile.warps, **launch_options(early),
        )  # fmt: skip
    return out
