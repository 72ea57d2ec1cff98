"""The Triton backend of the residual norm: CUDA devices, or CPU tensors in Triton's interpreter.

A program holds some whole rows in registers and goes through a group of rows with them. Forward: one launch.
Backward: one that makes the gradients of rows and keeps the sums of its group's columns in registers, and a small one
(``column_sums.py``) that joins the sums of all groups. No number is read or written twice, but for those sums; the
mask of the dropout is made again.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels import column_sums
from fastmetro_kernels.dropout.random import scale_of_kept, threshold
from fastmetro_kernels.dropout.triton_random import kept_factors
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device
from fastmetro_kernels.residual_norm import ops
from fastmetro_kernels.residual_norm.plan import ResidualNormConfig, plan

SIZES = ["rows", "period", "each", "threshold", "groups"]
"""Arguments whose values make no kernels of their own."""


@triton.jit(do_not_specialize=SIZES)
def residual_norm_kernel(
    stream, branch, weight, bias, branch_bias, seed, new_stream, normed, mean, inverse, rows, width, period, each,
    epsilon, threshold, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, BIASED: tl.constexpr, SHARED: tl.constexpr,
    DROPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """new_stream = stream + dropout(branch + branch_bias) where there is a BRANCH and it is BIASED, and its norm.

    Where the stream is SHARED it begins again after `period` rows. Dropped numbers are multiplied by 0 and not left
    out: what is no number stays so, as in PyTorch.
    """
    await_earlier_kernels(EARLY)
    c = tl.arange(0, BLOCK)
    known = c < width
    gain = tl.load(weight + c, mask=known, other=0.0)[None, :]
    low = tl.load(bias + c, mask=known, other=0.0)[None, :]
    if BIASED:
        extra = tl.load(branch_bias + c, mask=known, other=0.0)[None, :]
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, rows)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        offset = row.to(tl.int64)[:, None] * width + c[None, :]
        source = (row % period).to(tl.int64)[:, None] * width + c[None, :] if SHARED else offset
        x = tl.load(stream + source, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            added = tl.load(branch + offset, mask=inside, other=0.0).to(tl.float32)
            if BIASED:
                added += extra
            if DROPS:
                added *= kept_factors(seed, row, threshold, scale, ROWS, BLOCK)
            rounded = (x + added).to(new_stream.dtype.element_ty)
            tl.store(new_stream + offset, rounded, mask=inside)
            x = rounded.to(tl.float32)
        middle = tl.sum(x, 1) / width
        x = tl.where(inside, x - middle[:, None], 0.0)
        over = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)
        tl.store(mean + row, middle, mask=row < end)
        tl.store(inverse + row, over, mask=row < end)
        y = x * over[:, None] * gain + low
        tl.store(normed + offset, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _add_both(one, other, more_of_one, more_of_other):
    return one + more_of_one, other + more_of_other


@triton.jit(do_not_specialize=SIZES)
def residual_norm_backward_kernel(
    grad, more, x, weight, mean, inverse, seed, grad_stream, grad_branch, partials, rows, width, groups, each,
    threshold, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr, MORE: tl.constexpr, SPLIT: tl.constexpr,
    BIASED: tl.constexpr, DROPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradients of rows: that of the norm where NORMED, + that of the new stream where there is MORE; the branch's,
    too, where it is SPLIT from the stream's. And the sums of this program's rows: for the bias and the weight where
    NORMED, and behind them for the branch's bias where it is BIASED."""
    await_earlier_kernels(EARLY)
    c = tl.arange(0, BLOCK)
    known = c < width
    gain = tl.load(weight + c, mask=known, other=0.0)[None, :]
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, rows)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    branches = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        offset = row.to(tl.int64)[:, None] * width + c[None, :]
        if MORE:
            others = tl.load(more + offset, mask=inside, other=0.0)
        if NORMED:
            g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            middle = tl.load(mean + row, mask=row < end, other=0.0)[:, None]
            over = tl.load(inverse + row, mask=row < end, other=0.0)[:, None]
            value = (value - middle) * over  # what is not inside is multiplied by a gradient of 0
            sums += g
            products += g * value
            g *= gain
            common, slope = tl.reduce((g, g * value), 1, _add_both)  # at once: warps wait for one another, then
            g = (g - (common / width)[:, None] - value * (slope / width)[:, None]) * over
            if MORE:
                g += others.to(tl.float32)
        else:
            g = others.to(tl.float32)
        tl.store(grad_stream + offset, g.to(grad_stream.dtype.element_ty), mask=inside)
        if SPLIT or BIASED:
            if DROPS:
                g *= kept_factors(seed, row, threshold, scale, ROWS, BLOCK)
            if SPLIT:
                tl.store(grad_branch + offset, g.to(grad_branch.dtype.element_ty), mask=inside)
            if BIASED:
                branches += g  # 0 of a row that is not there; columns that are not there are not stored
    to = partials + tl.program_id(0).to(tl.int64) * width + c
    if NORMED:
        tl.store(to, tl.sum(sums, 0), mask=known)
        to += groups.to(tl.int64) * width
        tl.store(to, tl.sum(products, 0), mask=known)
        to += groups.to(tl.int64) * width
    if BIASED:
        tl.store(to, tl.sum(branches, 0), mask=known)


def forward(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, epsilon: float, dtype: torch.dtype, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_forward(stream, branch, weight, bias, branch_bias, seed)
    results = new_stream, normed, mean, inverse = ops.empty_results(stream, branch, dtype)
    rows, width = mean.numel(), stream.shape[-1]
    if normed.numel() == 0:
        return results
    found = plan(rows, width, False, ResidualNormConfig(*config) if config else None)
    period = stream.numel() // width
    early = launches_early(stream)
    with on_device(stream):
        residual_norm_kernel[(found.groups,)](
            stream, branch, weight, bias, branch_bias, seed, new_stream, normed, mean, inverse, rows, width, period,
            found.rows_each, epsilon, threshold(dropout_p), scale_of_kept(dropout_p),
            ROWS=found.rows, BLOCK=found.block, BRANCH=branch is not None, BIASED=branch_bias is not None,
            SHARED=period != rows, DROPS=seed is not None, EARLY=early, num_warps=found.warps, **launch_options(early),
        )  # fmt: skip
    return results


def backward(
    grad: Tensor | None, more: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor,
    seed: Tensor | None, dropout_p: float, stream_dtype: torch.dtype, branch_dtype: torch.dtype | None, biased: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_backward(grad, more, x, weight, mean, inverse, seed)
    gradients = ops.empty_gradients(x, weight, seed, stream_dtype, branch_dtype, biased)
    grad_stream, grad_branch, grad_weight, grad_bias, grad_branch_bias = gradients
    rows, width = mean.numel(), x.shape[-1]
    if grad is None or x.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
    if x.numel() == 0:
        grad_branch_bias.zero_()
        return gradients
    summed = [*([grad_bias, grad_weight] if grad is not None else []), *([grad_branch_bias] if biased else [])]
    found = plan(rows, width, True, ResidualNormConfig(*config) if config else None)
    partials = torch.empty((len(summed), found.groups, width), dtype=torch.float32, device=x.device)
    early = launches_early(x)
    options: dict[str, Any] = {"EARLY": early, **launch_options(early)}
    with on_device(x):
        residual_norm_backward_kernel[(found.groups,)](
            grad, more, x, weight, mean, inverse, seed, grad_stream, grad_branch, partials, rows, width,
            found.groups, found.rows_each, threshold(dropout_p), scale_of_kept(dropout_p),
            ROWS=found.rows, BLOCK=found.block, NORMED=grad is not None, MORE=more is not None,
            SPLIT=ops.writes_branch(seed, stream_dtype, branch_dtype), BIASED=biased, DROPS=seed is not None,
            num_warps=found.warps, **options,
        )  # fmt: skip
        if summed:
            column_sums.join(partials, summed, options)
    return gradients
