"""The Triton backend of the dropout behind a ReLU: CUDA devices, or CPU tensors in Triton's interpreter.

One launch to a pass, over the elements in a line. A lane asks for four times 16 bytes in half precision before it
waits; the random numbers, a call for each of these 16 bytes, are computed while they come.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.dropout import ops
from fastmetro_kernels.dropout.random import scale_of_kept, threshold
from fastmetro_kernels.dropout.triton_random import kept_factors_of_line
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

BLOCK = 4096
"""Elements of a program."""
WARPS = 4


@triton.jit(do_not_specialize=["threshold"])  # whether 16 divides the count decides how wide reads are
def relu_dropout_kernel(
    x, seed, out, count, threshold, scale, BLOCK: tl.constexpr, DROPS: tl.constexpr, EARLY: tl.constexpr
):
    """dropout(relu(x)) of `count` elements. What is no number stays so: it is multiplied by 0, not left out."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    inside = place < count
    await_earlier_kernels(EARLY)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(value < 0.0, 0.0, value)
    if DROPS:
        group = start // 8 + tl.arange(0, BLOCK // 8)
        value *= kept_factors_of_line(seed, group, threshold, scale, BLOCK)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def relu_dropout_backward_kernel(grad, out, grad_x, count, scale, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The gradient where the result is positive, times the scale of what was kept."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    await_earlier_kernels(EARLY)
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    through = tl.where(result > 0.0, given * scale, 0.0)
    tl.store(grad_x + place, through.to(grad_x.dtype.element_ty), mask=inside)


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    early = launches_early(x)
    options = {"BLOCK": BLOCK, "EARLY": early, "num_warps": WARPS} | launch_options(early)
    return (triton.cdiv(x.numel(), BLOCK),), options


def forward(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_line("x", x)
    ops.check_seed(seed)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    grid, options = _launch(x)
    with on_device(x):
        relu_dropout_kernel[grid](
            x, seed, out, x.numel(), threshold(p), scale_of_kept(p), DROPS=seed is not None, **options
        )
    return out


def backward(grad: Tensor, out: Tensor, p: float) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_backward(grad, out)
    grad_x = torch.empty_like(grad)
    if grad.numel() == 0:
        return grad_x
    grid, options = _launch(grad)
    with on_device(grad):
        relu_dropout_backward_kernel[grid](grad, out, grad_x, grad.numel(), scale_of_kept(p), **options)
    return grad_x
