"""The Triton backend of the change of order: CUDA devices, or CPU tensors in Triton's interpreter.

A program writes consecutive numbers, so that lines of memory are written whole; what it reads are as many consecutive
numbers of every plane.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.channels_last import ops
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

BLOCKS = (2048, 1024, 512)
"""Numbers of a program; eight per lane of 8, 4 and 2 warps."""
_FILLED = 264
"""Programs that keep a large GPU of about 130 multiprocessors busy: two each."""


@triton.jit(do_not_specialize=["numbers"])
def to_channels_last_kernel(x, out, pixels, numbers, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK of an image's CHANNELS * pixels numbers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    image = tl.program_id(1).to(tl.int64) * numbers
    await_earlier_kernels(EARLY)
    value = tl.load(x + image + at % CHANNELS * pixels + at // CHANNELS, mask=inside, other=0.0)
    tl.store(out + image + at, value.to(out.dtype.element_ty), mask=inside)


def to_channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``. Returns [B, H, W, C], contiguous."""
    ops.check_arguments(x, dtype)
    batch, channels, height, width = x.shape
    out = torch.empty((batch, height, width, channels), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    numbers = channels * height * width
    block = next((one for one in BLOCKS if triton.cdiv(numbers, one) * batch >= _FILLED), BLOCKS[-1])
    early = launches_early(x)
    with on_device(x):
        to_channels_last_kernel[(triton.cdiv(numbers, block), batch)](
            x, out, height * width, numbers, CHANNELS=channels, BLOCK=block, EARLY=early,
            num_warps=block // 256, **launch_options(early),
        )  # fmt: skip
    return out
