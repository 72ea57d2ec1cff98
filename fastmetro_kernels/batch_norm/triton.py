"""The Triton backend of the batch norm: CUDA devices, or CPU tensors in Triton's interpreter.

Two launches to a pass: sums over groups of rows, then what they are for. In the second one every program joins what
all groups found of its own channels, and goes through its rows from the last to the first, which the caches still have.
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

from fastmetro_kernels.batch_norm import ops
from fastmetro_kernels.batch_norm.plan import CHANNELS, BatchNormConfig, Plan, plan
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

SIZES = ["rows", "groups", "tiles_each"]
"""Arguments whose values make no kernels of their own."""
PARTS = 16
"""Groups whose sums a program adds up at a time."""


@triton.jit
def _place(number, channels, rows, c, ROWS: tl.constexpr):
    """Offsets of the number-th tile of rows, and which of them are there."""
    row = number * ROWS + tl.arange(0, ROWS)
    return row.to(tl.int64)[:, None] * channels + c[None, :], (row < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def _store_two(partials, first, second, groups, channels, c):
    """Two numbers per channel of this program's group."""
    to = partials + tl.program_id(1) * channels + c
    tl.store(to, first, mask=c < channels)
    tl.store(to + groups * channels, second, mask=c < channels)


@triton.jit
def _add_sums(partials, groups, channels, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both numbers of all groups."""
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, groups, PARTS):
        offset, inside = _place(start // PARTS, channels, groups, c, PARTS)
        first += tl.load(partials + offset, mask=inside, other=0.0)
        second += tl.load(partials + groups * channels + offset, mask=inside, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _join_moments(partials, groups, channels, rows, each, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean and the variance of all groups' rows: `each` of all groups but the last."""
    near = tl.load(partials + c, mask=c < channels, other=0.0)  # from which the groups' means are not far
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, groups, PARTS):
        offset, inside = _place(start // PARTS, channels, groups, c, PARTS)
        group = start + tl.arange(0, PARTS)
        count = tl.minimum(rows - group * each, each).to(tl.float32)[:, None]
        apart = tl.load(partials + offset, mask=inside, other=0.0) - near[None, :]
        apart = tl.where(inside, apart, 0.0)
        squares = tl.load(partials + groups * channels + offset, mask=inside, other=0.0)
        first += count * apart
        second += squares + count * apart * apart
    apart = tl.sum(first, 0) / rows
    variance = tl.sum(second, 0) / rows - apart * apart
    return near + apart, tl.where(variance < 0.0, 0.0, variance)  # not tl.maximum: what is not a number stays so


@triton.jit(do_not_specialize=SIZES)
def batch_norm_moments_kernel(
    x, partials, rows, channels, groups, tiles_each,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The mean of each group of rows, and the sum of the squares of what its rows are off it.

    Numbers are summed less the mean of the group's first tile, so that their squares keep their digits.
    """
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(1) * tiles_each
    offset, inside = _place(start, channels, rows, c, ROWS)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    near = tl.sum(value, 0) / tl.minimum(rows - start * ROWS, ROWS).to(tl.float32)
    first = tl.where(inside, value - near[None, :], 0.0)
    second = first * first
    for i in range(1, tiles_each):
        offset, inside = _place(start + i, channels, rows, c, ROWS)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - near[None, :], 0.0)
        first += value
        second += value * value
    count = tl.minimum(rows - start * ROWS, tiles_each * ROWS).to(tl.float32)
    apart = tl.sum(first, 0) / count
    _store_two(partials, near + apart, tl.sum(second, 0) - count * apart * apart, groups, channels, c)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_kernel(
    x, residual, weight, bias, partials, running_mean, running_var, batches, out, mean, variance,
    rows, channels, groups, tiles_each, epsilon, momentum,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, RUNNING: tl.constexpr, COUNTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The norm, + residual, and its ReLU. Where RUNNING the moments go into the running averages, too."""
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    middle, spread = _join_moments(partials, groups, channels, rows, tiles_each * ROWS, c, PARTS, CHANNELS)
    if tl.program_id(1) == 0:
        tl.store(mean + c, middle, mask=known)
        tl.store(variance + c, spread, mask=known)
        if RUNNING:
            before = tl.load(running_mean + c, mask=known, other=0.0)
            tl.store(running_mean + c, before + momentum * (middle - before), mask=known)
            before = tl.load(running_var + c, mask=known, other=0.0)
            unbiased = spread * (rows / (rows - 1.0))
            tl.store(running_var + c, before + momentum * (unbiased - before), mask=known)
        if COUNTED:  # noqa: SIM102 - one is known when it is compiled
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(batches) + 1)
    scale = tl.load(weight + c, mask=known, other=0.0) * tl.rsqrt(spread + epsilon)
    low = tl.load(bias + c, mask=known, other=0.0)
    for i in range(tiles_each):
        number = tl.program_id(1) * tiles_each + tiles_each - 1 - i
        offset, inside = _place(number, channels, rows, c, ROWS)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        y = (value - middle[None, :]) * scale[None, :] + low[None, :]
        if RESIDUAL:
            y += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)
        tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _before_relu(grad, x, out, offset, inside, middle, scale, low, RELU: tl.constexpr, KEPT: tl.constexpr):
    """x - mean and the gradient in front of the ReLU. What that let through `out` tells, where it was KEPT."""
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - middle[None, :]
    if RELU:
        if KEPT:
            through = tl.load(out + offset, mask=inside, other=0.0).to(tl.float32)
        else:
            through = value * scale[None, :] + low[None, :]
        g = tl.where(through > 0.0, g, 0.0)
    return value, g


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_sums_kernel(
    grad, x, out, weight, bias, mean, variance, partials, rows, channels, groups, tiles_each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RELU: tl.constexpr, KEPT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient in front of the ReLU, and of it times x - mean."""
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    middle = tl.load(mean + c, mask=known, other=0.0)
    inverse = tl.rsqrt(tl.load(variance + c, mask=known, other=1.0) + epsilon)
    scale = tl.load(weight + c, mask=known, other=0.0) * inverse
    low = tl.load(bias + c, mask=known, other=0.0)
    first = tl.zeros([ROWS, CHANNELS], tl.float32)
    second = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in range(tiles_each):
        offset, inside = _place(tl.program_id(1) * tiles_each + i, channels, rows, c, ROWS)
        value, g = _before_relu(grad, x, out, offset, inside, middle, scale, low, RELU, KEPT)
        first += g
        second += tl.where(inside, g * value, 0.0)
    _store_two(partials, tl.sum(first, 0), tl.sum(second, 0), groups, channels, c)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_kernel(
    grad, x, out, weight, bias, mean, variance, partials, grad_x, grad_weight, grad_bias, grad_residual,
    rows, channels, groups, tiles_each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
    RELU: tl.constexpr, KEPT: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the channels' weights and biases, and of the residual."""
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    first, second = _add_sums(partials, groups, channels, c, PARTS, CHANNELS)
    middle = tl.load(mean + c, mask=known, other=0.0)
    inverse = tl.rsqrt(tl.load(variance + c, mask=known, other=1.0) + epsilon)
    scale = tl.load(weight + c, mask=known, other=0.0) * inverse
    low = tl.load(bias + c, mask=known, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(grad_weight + c, second * inverse, mask=known)
        tl.store(grad_bias + c, first, mask=known)
    common = first / rows
    slope = second * inverse * inverse / rows
    for i in range(tiles_each):
        number = tl.program_id(1) * tiles_each + tiles_each - 1 - i
        offset, inside = _place(number, channels, rows, c, ROWS)
        value, g = _before_relu(grad, x, out, offset, inside, middle, scale, low, RELU, KEPT)
        if RESIDUAL:
            tl.store(grad_residual + offset, g.to(grad_residual.dtype.element_ty), mask=inside)
        g = (g - common[None, :] - value * slope[None, :]) * scale[None, :]
        tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), mask=inside)


def _shared_out(x: Tensor, config: Sequence[int]) -> tuple[Plan, Tensor, tuple[int, ...], dict[str, Any]]:
    """The plan, room for sums, the sizes that kernels take, and the options of their launches."""
    channels = x.shape[1]
    rows = x.numel() // channels
    found = plan(rows, channels, BatchNormConfig(*config) if config else None)
    partials = torch.empty((2, found.groups, channels), dtype=torch.float32, device=x.device)
    sizes = (rows, channels, found.groups, found.rows_each // found.rows)
    early = launches_early(x)
    options = {"ROWS": found.rows, "CHANNELS": CHANNELS, "EARLY": early, "num_warps": found.warps}
    return found, partials, sizes, options | launch_options(early)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, epsilon: float, relu: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_forward(x, residual, weight, bias, running_mean, running_var, batches)
    out, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    found, partials, sizes, options = _shared_out(x, config)
    grid = (found.blocks, found.groups)
    with on_device(x):
        batch_norm_moments_kernel[grid](x, partials, *sizes, **options)
        batch_norm_kernel[grid](
            x, residual, weight, bias, partials, running_mean, running_var, batches, out, mean, variance,
            *sizes, epsilon, momentum, PARTS=PARTS, RESIDUAL=residual is not None, RELU=relu,
            RUNNING=running_mean is not None, COUNTED=batches is not None, **options,
        )  # fmt: skip
    return out, mean, variance


def backward(
    grad: Tensor, x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor,
    epsilon: float, relu: bool, residual: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    vectors = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    ops.check_arguments(x, {"grad": grad, "out": out}, vectors)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    behind = torch.empty_like(x) if residual else x.new_empty(0)
    found, partials, sizes, options = _shared_out(x, config)
    grid, kept = (found.blocks, found.groups), out is not None
    with on_device(x):
        batch_norm_backward_sums_kernel[grid](
            grad, x, out, weight, bias, mean, variance, partials, *sizes, epsilon, RELU=relu, KEPT=kept, **options
        )
        batch_norm_backward_kernel[grid](
            grad, x, out, weight, bias, mean, variance, partials, grad_x, grad_weight, grad_bias,
            behind if residual else None, *sizes, epsilon,
            PARTS=PARTS, RELU=relu, KEPT=kept, RESIDUAL=residual, **options,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, behind
