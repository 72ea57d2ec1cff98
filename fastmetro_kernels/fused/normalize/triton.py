"""The Triton backend of the row norm: CUDA devices, or CPU tensors in Triton's interpreter.

A program holds several whole rows in registers, so that each number is read and written once.
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
from fastmetro_kernels.fused.normalize import ops
from fastmetro_kernels.fused.normalize.configs import NormalizeConfig, pinned


@triton.jit(do_not_specialize=["rows"])
def normalize_rows_kernel(
    x, shift, out, rows, tokens, stride_batch, stride_token, stride_dim, epsilon,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
    MARKS: tl.constexpr, MARK_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of WIDTH numbers, to each of which `shift` is added where SHIFTED, and MARKS behind each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(row, rows - 1)
    batch, token = (near // tokens).to(tl.int64), (near % tokens).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (k < WIDTH)[None, :]
    base = x + batch * stride_batch + token * stride_token
    await_earlier_kernels(EARLY)
    tile = tl.load(base[:, None] + (k.to(tl.int64) * stride_dim)[None, :], mask=inside, other=0.0).to(tl.float32)
    if SHIFTED:
        tile += tl.load(shift + k, mask=k < WIDTH, other=0.0)[None, :]
    mean = tl.sum(tile, 1) / WIDTH
    centred = tl.where(inside, tile - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + epsilon)
    target = out + row.to(tl.int64)[:, None] * (WIDTH + MARKS)
    tl.store(target + k[None, :], (centred * inverse[:, None]).to(out.dtype.element_ty), mask=inside)
    if MARKS > 0:
        place = tl.arange(0, MARK_BLOCK)
        marks = (place[None, :] == token[:, None]).to(out.dtype.element_ty)
        tl.store(target + WIDTH + place[None, :], marks, mask=(row < rows)[:, None] & (place < MARKS)[None, :])


def normalize(x: Tensor, shift: Tensor | None, epsilon: float, marks: int, config: Sequence[int]) -> Tensor:
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_arguments(x, shift, marks, config)
    batch, tokens, width = x.shape
    out = torch.empty((batch, tokens, width + marks), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = batch * tokens
    tile = NormalizeConfig(*config) if config else pinned(rows, width)
    early = launches_early(x)
    with on_device(x):
        normalize_rows_kernel[(triton.cdiv(rows, tile.rows),)](
            x, shift, out, rows, tokens, *x.stride(), epsilon,
            WIDTH=width, ROWS=tile.rows, BLOCK=triton.next_power_of_2(width), SHIFTED=shift is not None,
            MARKS=marks, MARK_BLOCK=triton.next_power_of_2(max(marks, 1)), EARLY=early,
            num_warps=tile.warps, **launch_options(early),
        )  # fmt: skip
    return out
