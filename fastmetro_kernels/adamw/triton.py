"""The Triton backend: CUDA devices, or CPU tensors in Triton's interpreter.

Three launches for any number of tensors. `adamw_norm_kernel` sums the squares of each chunk of the gradients;
`adamw_factors_kernel`, one program, adds these up, counts each tensor's steps and computes what its update is scaled
by; `adamw_update_kernel` takes the chunks from the last to the first, whose gradients the caches still have. Programs
find tensors by addresses in a table. They move 16 bytes at a time where all addresses and sizes allow it.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fastmetro_kernels.adamw.plan import PINNED, SHIFT, AdamWConfig
from fastmetro_kernels.adamw.tables import Tables
from fastmetro_kernels.fused.early_launch import await_earlier_kernels, launch_options, launches_early, on_device

if TYPE_CHECKING:
    from fastmetro_kernels.adamw.api import AdamWGroup

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of gradients; of half-precision copies, where 0 is none."""
# Rows of the table, which the kernels name by their numbers: 0 gradient, 1 its kind, 2 size, 3 parameter, 4 and 5
# moments, 6 copy, 7 its kind, 8 step, 9 rate, or 0 where 10 holds the rate itself, 11 and 12 betas, 13 epsilon,
# 14 weight decay. Numbers from row 10 on are float64.
FACTORS = 8
PARTS, TENSORS, WARPS = 2048, 256, 8
"""Sums and tensors that `adamw_factors_kernel` takes at a time, and its warps."""


@triton.jit
def _chunk(chunks, number, table, tensors, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """The tensor of a chunk, where the chunk begins in it, and how many numbers it has."""
    code = tl.load(chunks + number)
    tensor = (code >> SHIFT).to(tl.int32)
    begin = (code & ((1 << SHIFT) - 1)) * CHUNK
    size = tl.load(table + 2 * tensors + tensor)
    return tensor, begin, tl.minimum(size - begin, CHUNK).to(tl.int32)


@triton.jit
def _at(address, begin, KIND: tl.constexpr, WIDE: tl.constexpr):
    """A pointer to number `begin` of the tensor at an address, which is a multiple of 16 where WIDE."""
    pointer = address.to(tl.pointer_type(KIND))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + begin


@triton.jit
def _gradient(address, kind, begin, at, inside, WIDE: tl.constexpr):
    """Numbers of a gradient, in float32."""
    if kind == 0:
        g = tl.load(_at(address, begin, tl.float32, WIDE) + at, mask=inside, other=0.0)
    elif kind == 1:
        g = tl.load(_at(address, begin, tl.bfloat16, WIDE) + at, mask=inside, other=0.0).to(tl.float32)
    else:
        g = tl.load(_at(address, begin, tl.float16, WIDE) + at, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
def _squares(address, kind, begin, length, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Their sum over a chunk."""
    if WIDE:
        length = length // 8 * 8  # the same number; tl.multiple_of says nothing about what a function is given
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = _gradient(address, kind, begin, at, at < length, WIDE)
        total += g * g
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["tensors"])
def adamw_norm_kernel(
    chunks, table, partials, tensors,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of one chunk of the gradients."""
    await_earlier_kernels(EARLY)
    tensor, begin, length = _chunk(chunks, tl.program_id(0), table, tensors, SHIFT, CHUNK)
    address, kind = tl.load(table + tensor), tl.load(table + tensors + tensor)
    if (address % 16 == 0) & (length % 8 == 0):
        total = _squares(address, kind, begin, length, CHUNK, BLOCK, True)
    else:
        total = _squares(address, kind, begin, length, CHUNK, BLOCK, False)
    tl.store(partials + tl.program_id(0), total)


@triton.jit
def _real(row, known, OTHER: tl.constexpr):
    """Float64 numbers of a row of the table."""
    return tl.where(known, tl.load(row, mask=known, other=0).to(tl.float64, bitcast=True), OTHER)


@triton.jit(do_not_specialize=["parts", "tensors"])
def adamw_factors_kernel(
    table, partials, norm, factors, parts, tensors, max_norm,
    PARTS: tl.constexpr, TENSORS: tl.constexpr, FACTORS: tl.constexpr,
    NORM: tl.constexpr, UPDATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The norm (if NORM), steps, and for each tensor what `adamw_update_kernel` multiplies by (if UPDATE)."""
    await_earlier_kernels(EARLY)
    scale = 1.0
    if NORM:
        total = tl.zeros([PARTS], tl.float32)
        for start in range(0, parts, PARTS):
            at = start + tl.arange(0, PARTS)
            total += tl.load(partials + at, mask=at < parts, other=0.0)
        found = tl.sqrt_rn(tl.sum(total, 0))
        tl.store(norm, found)
        scale = tl.div_rn(max_norm, found + 1e-6)
        scale = tl.where(scale > 1.0, 1.0, scale)  # not tl.minimum: what is not a number stays so
    if UPDATE:
        for start in range(0, tensors, TENSORS):
            i = start + tl.arange(0, TENSORS)
            known = i < tensors
            row = table + i
            step = tl.load(row + 8 * tensors, mask=known, other=0).to(tl.pointer_type(tl.float32))
            number = tl.load(step, mask=known, other=0.0) + 1.0
            tl.store(step, number, mask=known)
            rate = tl.load(row + 9 * tensors, mask=known, other=0)
            there = known & (rate != 0)
            given = tl.load(rate.to(tl.pointer_type(tl.float32)), mask=there, other=0.0).to(tl.float64)
            given = tl.where(there, given, _real(row + 10 * tensors, known, 0.0))
            number = number.to(tl.float64)
            first = _real(row + 11 * tensors, known, 0.5)
            second = _real(row + 12 * tensors, known, 0.5)
            epsilon = _real(row + 13 * tensors, known, 0.0)
            decay = _real(row + 14 * tensors, known, 0.0)
            # 1 - beta^t in float64: at first it is the difference of two numbers that are nearly equal.
            left = 1.0 - tl.exp(number * tl.log(first))
            right = 1.0 - tl.exp(number * tl.log(second))
            to = factors + i * FACTORS
            tl.store(to, (given * decay).to(tl.float32), mask=known)
            tl.store(to + 1, (given / left).to(tl.float32), mask=known)
            tl.store(to + 2, (1.0 / tl.sqrt(right)).to(tl.float32), mask=known)
            tl.store(to + 3, (1.0 - first).to(tl.float32), mask=known)
            tl.store(to + 4, (1.0 - second).to(tl.float32), mask=known)
            tl.store(to + 5, epsilon.to(tl.float32), mask=known)
            tl.store(to + 6, tl.zeros([TENSORS], tl.float32) + scale, mask=known)


@triton.jit
def _update(
    gradient, kind, parameter, first, second, half, half_kind, factors, begin, length,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """AdamW on one chunk."""
    if WIDE:
        length = length // 8 * 8  # the same number; tl.multiple_of says nothing about what a function is given
    decay, rate, inverse = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    left, right = tl.load(factors + 3), tl.load(factors + 4)
    epsilon, scale = tl.load(factors + 5), tl.load(factors + 6)
    to_p = _at(parameter, begin, tl.float32, WIDE)
    to_m = _at(first, begin, tl.float32, WIDE)
    to_v = _at(second, begin, tl.float32, WIDE)
    for start in range(0, tl.cdiv(length, BLOCK)):
        at = start * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        # All loads before the branches over the gradient's type, where it is waited for. Moments are not used again in
        # this step, so they make room for what is.
        p = tl.load(to_p + at, mask=inside, other=0.0)
        m = tl.load(to_m + at, mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(to_v + at, mask=inside, other=0.0, eviction_policy="evict_first")
        g = _gradient(gradient, kind, begin, at, inside, WIDE) * scale
        m += left * (g - m)
        v += right * (g * g - v)
        p -= decay * p + rate * (m / (tl.sqrt_rn(v) * inverse + epsilon))
        tl.store(to_p + at, p, mask=inside)
        tl.store(to_m + at, m, mask=inside, eviction_policy="evict_first")
        tl.store(to_v + at, v, mask=inside, eviction_policy="evict_first")
        if half_kind == 1:
            tl.store(_at(half, begin, tl.bfloat16, WIDE) + at, p.to(tl.bfloat16), mask=inside)
        elif half_kind == 2:
            tl.store(_at(half, begin, tl.float16, WIDE) + at, p.to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def adamw_update_kernel(
    chunks, table, factors, tensors,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FACTORS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """AdamW on one chunk of a tensor."""
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, begin, length = _chunk(chunks, number, table, tensors, SHIFT, CHUNK)
    row = table + tensor
    gradient, kind = tl.load(row), tl.load(row + tensors)
    parameter, first, second = tl.load(row + 3 * tensors), tl.load(row + 4 * tensors), tl.load(row + 5 * tensors)
    half, half_kind = tl.load(row + 6 * tensors), tl.load(row + 7 * tensors)
    await_earlier_kernels(EARLY)  # what is above was there before the kernel in front of this one
    given = factors + tensor * FACTORS
    if ((gradient | parameter | first | second | half) % 16 == 0) & (length % 8 == 0):
        _update(gradient, kind, parameter, first, second, half, half_kind, given, begin, length, CHUNK, BLOCK, True)
    else:
        _update(gradient, kind, parameter, first, second, half, half_kind, given, begin, length, CHUNK, BLOCK, False)


def _bits(values: Sequence[Sequence[float]]) -> NDArray[np.int64]:
    return np.asarray(values, dtype=np.float64).view(np.int64)


def _gradient_rows(gradients: Sequence[Tensor]) -> list[list[int]]:
    return [
        [gradient.data_ptr() for gradient in gradients],
        [KINDS[gradient.dtype] for gradient in gradients],
        [gradient.numel() for gradient in gradients],
    ]


def _rows(groups: Sequence[AdamWGroup], gradients: Sequence[Tensor]) -> NDArray[np.int64]:
    """The whole table."""
    rows: list[list[int]] = [*_gradient_rows(gradients), *([] for _ in range(7))]
    numbers: list[list[float]] = [[] for _ in range(5)]
    for group in groups:
        count = len(group.parameters)
        halves = group.halves if group.halves is not None else [None] * count
        for row, tensors in zip(rows[3:6], (group.parameters, group.exp_avgs, group.exp_avg_sqs), strict=True):
            row += [tensor.data_ptr() for tensor in tensors]
        rows[6] += [0 if half is None else half.data_ptr() for half in halves]
        rows[7] += [0 if half is None else KINDS[half.dtype] for half in halves]
        rows[8] += [step.data_ptr() for step in group.steps]
        named = isinstance(group.rate, Tensor)
        rows[9] += [group.rate.data_ptr() if isinstance(group.rate, Tensor) else 0] * count
        hyper = (0.0 if named else float(group.rate), *group.betas, group.epsilon, group.weight_decay)
        for column, value in zip(numbers, hyper, strict=True):
            column += [value] * count
    return np.concatenate([np.asarray(rows, dtype=np.int64), _bits(numbers)])


def norm_block(config: AdamWConfig) -> int:
    """Numbers at a time where there is one tensor: twice as many of it."""
    return min(2 * config.block, config.chunk)


def _sum_squares(table: Tensor, chunks: Tensor, config: AdamWConfig, tensors: int) -> Tensor:
    """One sum per chunk."""
    partials = torch.empty(chunks.numel(), dtype=torch.float32, device=table.device)
    if chunks.numel():
        # It lets the next one start early, and is not launched early itself: what was in front of it is no kernel.
        adamw_norm_kernel[(chunks.numel(),)](
            chunks, table, partials, tensors, SHIFT=SHIFT, CHUNK=config.chunk, BLOCK=norm_block(config),
            EARLY=launches_early(table), num_warps=config.warps,
        )  # fmt: skip
    return partials


def gradient_norm(gradients: Sequence[Tensor], tables: Tables, config: AdamWConfig | None) -> Tensor:
    """See ``api.gradient_norm``; the gradients are dense and on one device."""
    config, device, tensors = config or PINNED, gradients[0].device, len(gradients)
    with on_device(gradients[0]):
        chunks = tables.chunks([gradient.numel() for gradient in gradients], config.chunk, device)
        table = tables.upload(np.asarray(_gradient_rows(gradients), dtype=np.int64), device)
        norm = torch.empty((), dtype=torch.float32, device=device)
        partials = _sum_squares(table, chunks, config, tensors)
        early = launches_early(table)
        adamw_factors_kernel[(1,)](
            table, partials, norm, norm, chunks.numel(), tensors, 0.0, PARTS=PARTS, TENSORS=TENSORS, FACTORS=FACTORS,
            NORM=True, UPDATE=False, EARLY=early, num_warps=WARPS, **launch_options(early and chunks.numel() > 0),
        )  # fmt: skip
    return norm


def adamw(
    groups: Sequence[AdamWGroup], gradients: Sequence[Tensor], max_norm: float | None, tables: Tables,
    config: AdamWConfig | None,
) -> Tensor | None:  # fmt: skip
    """See ``api.adamw``; the gradients are those of all groups, as their parameters lie in memory."""
    config, device, tensors = config or PINNED, gradients[0].device, len(gradients)
    with on_device(gradients[0]):
        chunks = tables.chunks([gradient.numel() for gradient in gradients], config.chunk, device)
        table = tables.upload(_rows(groups, gradients), device)
        factors = torch.empty((tensors, FACTORS), dtype=torch.float32, device=device)
        # Without a norm nothing is read from these two.
        norm = torch.empty((), dtype=torch.float32, device=device) if max_norm is not None else None
        partials = factors if norm is None else _sum_squares(table, chunks, config, tensors)
        early, second = launches_early(table), norm is not None and chunks.numel() > 0
        adamw_factors_kernel[(1,)](
            table, partials, factors if norm is None else norm, factors, chunks.numel(), tensors,
            float(max_norm or 0.0), PARTS=PARTS, TENSORS=TENSORS, FACTORS=FACTORS, NORM=norm is not None, UPDATE=True,
            EARLY=early, num_warps=WARPS, **launch_options(early and second),
        )  # fmt: skip
        if chunks.numel():
            adamw_update_kernel[(chunks.numel(),)](
                chunks, table, factors, tensors, SHIFT=SHIFT, CHUNK=config.chunk, BLOCK=config.block, FACTORS=FACTORS,
                EARLY=early, num_warps=config.warps, **launch_options(early),
            )  # fmt: skip
    return norm
