"""The Triton backend of the batch norm: CUDA devices, or CPU tensors in Triton's interpreter.

Two launches to a pass: sums over groups of rows, then what they are for. The program that ends last among those of its
channels joins what all found; a counter per block of channels tells it, and is back at 0 afterwards. The second launch
goes through each group's rows from the last to the first, which the caches still have. A lane asks for four to eight
times 16 bytes before it waits for the first: less does not keep the memory busy.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.batch_norm import ops
from fastmetro_kernels.batch_norm.plan import CHANNELS, BatchNormConfig, Plan, plan
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

SIZES = ["rows", "groups", "each"]
"""Arguments whose values make no kernels of their own."""
PARTS = 64
"""Groups whose sums a program adds up at a time."""


@triton.jit
def _place(row, end, channels, c, ROWS: tl.constexpr):
    """Offsets of a tile of rows from `row` on, and which of them are there."""
    rows = row + tl.arange(0, ROWS)
    return rows.to(tl.int64)[:, None] * channels + c[None, :], (rows < end)[:, None] & (c < channels)[None, :]


@triton.jit
def _load(base, row, end, channels, c, ROWS: tl.constexpr):
    offset, inside = _place(row, end, channels, c, ROWS)
    return tl.load(base + offset, mask=inside, other=0.0)


@triton.jit
def _load_four(base, row, end, channels, c, ROWS: tl.constexpr):
    """Four tiles, one behind the other."""
    return (
        _load(base, row, end, channels, c, ROWS),
        _load(base, row + ROWS, end, channels, c, ROWS),
        _load(base, row + 2 * ROWS, end, channels, c, ROWS),
        _load(base, row + 3 * ROWS, end, channels, c, ROWS),
    )


@triton.jit
def _last_of_its_channels(counters, partials, first, second, groups, channels, c):
    """Stores two numbers per channel of this program's group; whether those of all other groups are there, too."""
    to = partials + tl.program_id(1) * channels + c
    tl.store(to, first, mask=c < channels)
    tl.store(to + groups * channels, second, mask=c < channels)
    tl.debug_barrier()  # the counter is raised by one thread, for what all have stored
    last = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == groups - 1
    if last:
        tl.store(counters + tl.program_id(0), 0)
    return last


@triton.jit
def _load_sums(partials, start, groups, channels, c, PARTS: tl.constexpr):
    """Both numbers of some groups, not out of a cache that other multiprocessors do not write to."""
    offset, inside = _place(start, groups, channels, c, PARTS)
    first = tl.load(partials + offset, mask=inside, other=0.0, cache_modifier=".cg")
    return first, tl.load(partials + groups * channels + offset, mask=inside, other=0.0, cache_modifier=".cg"), inside


@triton.jit
def _add_sums(partials, groups, channels, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both numbers of all groups."""
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, groups, PARTS):
        one, other, _ = _load_sums(partials, start, groups, channels, c, PARTS)
        first += one
        second += other
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _join_moments(partials, groups, channels, rows, each, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean and the variance of all groups' rows: `each` of all groups but the last."""
    near = tl.load(partials + c, mask=c < channels, other=0.0, cache_modifier=".cg")  # other groups' are not far
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, groups, PARTS):
        mean, squares, inside = _load_sums(partials, start, groups, channels, c, PARTS)
        group = start + tl.arange(0, PARTS)
        count = tl.minimum(rows - group * each, each).to(tl.float32)[:, None]
        apart = tl.where(inside, mean - near[None, :], 0.0)
        first += count * apart
        second += squares + count * apart * apart
    apart = tl.sum(first, 0) / rows
    variance = tl.sum(second, 0) / rows - apart * apart
    return near + apart, tl.where(variance < 0.0, 0.0, variance)  # not tl.maximum: what is not a number stays so


@triton.jit(do_not_specialize=SIZES)
def batch_norm_moments_kernel(
    x, partials, counters, mean, variance, running_mean, running_var, batches, rows, channels, groups, each, momentum,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
    RUNNING: tl.constexpr, COUNTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The mean and the variance of all channels. Where RUNNING they go into the running averages, too.

    Each group of rows has a mean of its own and the sum of the squares of what its rows are off it. Numbers are summed
    less the mean of the group's first tile, so that their squares keep their digits.
    """
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    value = _load(x, begin, end, channels, c, ROWS).to(tl.float32)
    near = tl.sum(value, 0) / tl.minimum(end - begin, ROWS).to(tl.float32)
    first = tl.zeros([ROWS, CHANNELS], tl.float32)
    second = tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(begin, end, 8 * ROWS):
        these = _load_four(x, row, end, channels, c, ROWS)
        those = _load_four(x, row + 4 * ROWS, end, channels, c, ROWS)
        for i in tl.static_range(8):
            _, inside = _place(row + i * ROWS, end, channels, c, ROWS)
            value = these[i] if i < 4 else those[i - 4]
            value = tl.where(inside, value.to(tl.float32) - near[None, :], 0.0)
            first += value
            second += value * value
    count = (end - begin).to(tl.float32)
    apart = tl.sum(first, 0) / count
    squares = tl.sum(second, 0) - count * apart * apart
    if _last_of_its_channels(counters, partials, near + apart, squares, groups, channels, c):
        middle, spread = _join_moments(partials, groups, channels, rows, each, c, PARTS, CHANNELS)
        known = c < channels
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


@triton.jit
def _channels_of(mean, variance, weight, bias, channels, c, epsilon):
    """Of these channels the mean, one over the deviation, what x - mean is multiplied by, and the bias."""
    known = c < channels
    inverse = tl.rsqrt(tl.load(variance + c, mask=known, other=1.0) + epsilon)
    scale = tl.load(weight + c, mask=known, other=0.0) * inverse
    return (
        tl.load(mean + c, mask=known, other=0.0)[None, :],
        inverse,
        scale[None, :],
        tl.load(bias + c, mask=known, other=0.0)[None, :],
    )


@triton.jit
def _normalize(
    these, those, out, row, end, channels, c, middle, scale, low,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Four tiles of the result."""
    for i in tl.static_range(4):
        offset, inside = _place(row + i * ROWS, end, channels, c, ROWS)
        y = (these[i].to(tl.float32) - middle) * scale + low
        if RESIDUAL:
            y += those[i].to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)
        tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_kernel(
    x, residual, weight, bias, mean, variance, out, rows, channels, groups, each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The norm, + residual, and its ReLU.

    What earlier kernels than the last one wrote is read before that has ended: the first tiles are then there when the
    moments are.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    row = begin + (tl.cdiv(end - begin, 4 * ROWS) - 1) * 4 * ROWS
    these = _load_four(x, row, end, channels, c, ROWS)
    those = _load_four(residual, row, end, channels, c, ROWS) if RESIDUAL else these
    await_earlier_kernels(EARLY)
    middle, _, scale, low = _channels_of(mean, variance, weight, bias, channels, c, epsilon)
    _normalize(these, those, out, row, end, channels, c, middle, scale, low, ROWS, RESIDUAL, RELU)
    while row > begin:
        row -= 4 * ROWS
        these = _load_four(x, row, end, channels, c, ROWS)
        those = _load_four(residual, row, end, channels, c, ROWS) if RESIDUAL else these
        _normalize(these, those, out, row, end, channels, c, middle, scale, low, ROWS, RESIDUAL, RELU)


@triton.jit
def _through(g, value, kept, scale, low, RELU: tl.constexpr, KEPT: tl.constexpr):
    """The gradient in front of the ReLU. What that let through the result tells, where it was KEPT."""
    if RELU:
        let = kept.to(tl.float32) if KEPT else value * scale + low
        g = tl.where(let > 0.0, g, 0.0)
    return g


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_sums_kernel(
    grad, more, x, out, weight, bias, mean, variance, partials, counters, grad_weight, grad_bias, behind,
    rows, channels, groups, each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
    MORE: tl.constexpr, RELU: tl.constexpr, KEPT: tl.constexpr, BEHIND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradients of the channels' biases and weights: sums of the gradient in front of the ReLU, and of it times what is
    normalised. That gradient itself, too, where BEHIND."""
    await_earlier_kernels(EARLY)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    middle, inverse, scale, low = _channels_of(mean, variance, weight, bias, channels, c, epsilon)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    first = tl.zeros([ROWS, CHANNELS], tl.float32)
    second = tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(begin, end, 4 * ROWS):
        gradients = _load_four(grad, row, end, channels, c, ROWS)
        values = _load_four(x, row, end, channels, c, ROWS)
        if MORE:
            others = _load_four(more, row, end, channels, c, ROWS)
        if KEPT:
            results = _load_four(out, row, end, channels, c, ROWS)
        for i in tl.static_range(4):
            offset, inside = _place(row + i * ROWS, end, channels, c, ROWS)
            g = gradients[i].to(tl.float32)
            if MORE:
                g += others[i].to(tl.float32)
            value = values[i].to(tl.float32) - middle
            g = _through(g, value, results[i] if KEPT else value, scale, low, RELU, KEPT)
            if BEHIND:
                tl.store(behind + offset, g.to(behind.dtype.element_ty), mask=inside)
            first += g
            second += tl.where(inside, g * value, 0.0)
    if _last_of_its_channels(counters, partials, tl.sum(first, 0), tl.sum(second, 0), groups, channels, c):
        all_of_it, times = _add_sums(partials, groups, channels, c, PARTS, CHANNELS)
        tl.store(grad_bias + c, all_of_it, mask=c < channels)
        tl.store(grad_weight + c, times * inverse, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_kernel(
    grad, more, x, weight, bias, mean, variance, grad_weight, grad_bias, grad_x, rows, channels, groups, each, epsilon,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, MORE: tl.constexpr, RELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient of x. The ReLU, where there still is one, had no residual in front of it."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, rows)
    row = begin + (tl.cdiv(end - begin, 4 * ROWS) - 1) * 4 * ROWS
    values = _load_four(x, row, end, channels, c, ROWS)  # as in the forward kernel; `grad` may be the last kernel's
    await_earlier_kernels(EARLY)
    middle, inverse, scale, low = _channels_of(mean, variance, weight, bias, channels, c, epsilon)
    common = (tl.load(grad_bias + c, mask=known, other=0.0) / rows)[None, :]
    slope = (tl.load(grad_weight + c, mask=known, other=0.0) * inverse / rows)[None, :]
    while row >= begin:
        gradients = _load_four(grad, row, end, channels, c, ROWS)
        if MORE:
            others = _load_four(more, row, end, channels, c, ROWS)
        for i in tl.static_range(4):
            offset, inside = _place(row + i * ROWS, end, channels, c, ROWS)
            g = gradients[i].to(tl.float32)
            if MORE:
                g += others[i].to(tl.float32)
            value = values[i].to(tl.float32) - middle
            g = _through(g, value, value, scale, low, RELU, False)
            g = (g - common - value * slope) * scale
            tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), mask=inside)
        row -= 4 * ROWS
        if row >= begin:
            values = _load_four(x, row, end, channels, c, ROWS)


class _Shared(NamedTuple):
    """What both kernels of a pass share: their grid, room for sums, counters, sizes, and the options of launches."""

    grid: tuple[int, int]
    partials: Tensor
    counters: Tensor
    sizes: tuple[int, int, int, int]
    options: dict[str, Any]


def _shared_out(x: Tensor, counters: Tensor | None, config: Sequence[int]) -> _Shared:
    channels = x.shape[1]
    rows = x.numel() // channels
    found: Plan = plan(rows, channels, BatchNormConfig(*config) if config else None)
    partials = torch.empty((2, found.groups, channels), dtype=torch.float32, device=x.device)
    if counters is None:
        counters = x.new_zeros(found.blocks, dtype=torch.int32)
    early = launches_early(x)
    options = {"ROWS": found.rows, "CHANNELS": CHANNELS, "EARLY": early, "num_warps": found.warps}
    sizes = (rows, channels, found.groups, found.rows_each)
    return _Shared((found.blocks, found.groups), partials, counters, sizes, options | launch_options(early))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, counters: Tensor | None, momentum: float, epsilon: float,
    relu: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_forward(x, residual, weight, bias, running_mean, running_var, batches, counters)
    out, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    shared = _shared_out(x, counters, config)
    with on_device(x):
        batch_norm_moments_kernel[shared.grid](
            x, shared.partials, shared.counters, mean, variance, running_mean, running_var, batches, *shared.sizes,
            momentum, PARTS=PARTS, RUNNING=running_mean is not None, COUNTED=batches is not None, **shared.options,
        )  # fmt: skip
        batch_norm_kernel[shared.grid](
            x, residual, weight, bias, mean, variance, out, *shared.sizes, epsilon,
            RESIDUAL=residual is not None, RELU=relu, **shared.options,
        )  # fmt: skip
    return out, mean, variance


def backward(
    grad: Tensor, more: Tensor | None, x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, counters: Tensor | None, epsilon: float, relu: bool, behind: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run both kernels; arguments as in ``ops.py``."""
    ops.check_tile(config)
    ops.check_backward(grad, more, x, out, weight, bias, mean, variance, counters, behind)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    before = torch.empty_like(x) if behind else x.new_empty(0)
    shared = _shared_out(x, counters, config)
    with on_device(x):
        batch_norm_backward_sums_kernel[shared.grid](
            grad, more, x, out, weight, bias, mean, variance, shared.partials, shared.counters,
            grad_weight, grad_bias, before if behind else None, *shared.sizes, epsilon,
            PARTS=PARTS, MORE=more is not None, RELU=relu, KEPT=out is not None, BEHIND=behind, **shared.options,
        )  # fmt: skip
        # The gradient in front of the ReLU is there where it was asked for, and read instead of what it is made of.
        again = (before, None, False) if behind else (grad, more, relu)
        batch_norm_backward_kernel[shared.grid](
            again[0], again[1], x, weight, bias, mean, variance, grad_weight, grad_bias, grad_x, *shared.sizes, epsilon,
            MORE=again[1] is not None, RELU=again[2], **shared.options,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, before
