"""The Triton backend of the batch norm: CUDA devices, or CPU tensors in Triton's interpreter.

Two launches to a pass: sums over groups of rows, then what they are for. The program that ends last among those of its
channels joins what all found; a counter per block of channels tells it, and is back at 0 afterwards. The second launch
goes through each group's rows from the last to the first, which the caches still have. A lane asks for four to eight
times 16 bytes before it waits for the first: less does not keep the memory busy. What takes sums asks for the next tile
in place of each that it has added, so that as many stay under way: else the memory rests while it adds.
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

from fastmetro_kernels.batch_norm.plan import CHANNELS, BatchNormConfig, Plan, plan
from fastmetro_kernels.fused.early_launch import launch_options, launches_early

SIZES = ["rows", "groups", "each"]
"""Arguments whose values make no kernels of their own."""


def parts_at_a_time(warps: int, sums: int = 2) -> int:
    """Groups whose sums a program adds up at a time, a power of two: of more its registers would not hold three sums,
    or two of which as many more are under way."""
    return (8 if sums == 2 else 4) * warps


@triton.jit
def place(row, end, channels, c, ROWS: tl.constexpr):
    """Offsets of a tile of rows from `row` on, and which of them are there."""
    rows = row + tl.arange(0, ROWS)
    return rows.to(tl.int64)[:, None] * channels + c[None, :], (rows < end)[:, None] & (c < channels)[None, :]


@triton.jit
def load(base, row, end, channels, c, ROWS: tl.constexpr):
    """A tile of rows, 0 where it is not there."""
    offset, inside = place(row, end, channels, c, ROWS)
    return tl.load(base + offset, mask=inside, other=0.0)


@triton.jit
def load_four(base, row, end, channels, c, ROWS: tl.constexpr):
    """Four tiles, one behind the other."""
    return (
        load(base, row, end, channels, c, ROWS),
        load(base, row + ROWS, end, channels, c, ROWS),
        load(base, row + 2 * ROWS, end, channels, c, ROWS),
        load(base, row + 3 * ROWS, end, channels, c, ROWS),
    )


@triton.jit
def bits_of_channels(bits, rows, CHANNELS: tl.constexpr):
    """Where those of this program's channels begin. All of theirs lie together, so that it uses what it reads whole."""
    return bits + tl.program_id(0).to(tl.int64) * rows * (CHANNELS // 8)


@triton.jit
def place_bits(row, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets of a tile's bytes, which hold eight channels each, and which of them are there."""
    rows = row + tl.arange(0, ROWS)
    k = tl.arange(0, CHANNELS // 8)
    return rows.to(tl.int64)[:, None] * (CHANNELS // 8) + k[None, :], (rows < end)[:, None] & (k >= 0)[None, :]


@triton.jit
def store_bits(bits, let, row, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """What a tile's ReLU let through. A lane with eight channels side by side makes their byte alone."""
    offset, inside = place_bits(row, end, ROWS, CHANNELS)
    each = tl.reshape(let.to(tl.int32), [ROWS, CHANNELS // 8, 8]) << tl.arange(0, 8)[None, None, :]
    tl.store(bits + offset, tl.sum(each, 2).to(tl.uint8), mask=inside)


@triton.jit
def load_bits(bits, row, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's bytes."""
    offset, inside = place_bits(row, end, ROWS, CHANNELS)
    return tl.load(bits + offset, mask=inside, other=0)


@triton.jit
def unpack_bits(found, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a tile's bytes: which numbers the ReLU let through."""
    each = (found.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, [ROWS, CHANNELS]) != 0


@triton.jit
def last_of_its_channels(counters, partials, first, second, groups, channels, c):
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
def load_sums(partials, start, groups, channels, c, PARTS: tl.constexpr):
    """Both numbers of some groups, not out of a cache that other multiprocessors do not write to."""
    offset, inside = place(start, groups, channels, c, PARTS)
    first = tl.load(partials + offset, mask=inside, other=0.0, cache_modifier=".cg")
    return first, tl.load(partials + groups * channels + offset, mask=inside, other=0.0, cache_modifier=".cg"), inside


@triton.jit
def channels_of(mean, variance, weight, bias, channels, c, epsilon):
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


class Shared(NamedTuple):
    """What both kernels of a pass share: their grid, room for sums, counters, sizes, and the options of launches.

    `parts`: groups whose sums a program adds up at a time.
    """

    grid: tuple[int, int]
    partials: Tensor
    counters: Tensor
    sizes: tuple[int, int, int, int]
    options: dict[str, Any]
    parts: int


def shared_out(
    x: Tensor, counters: Tensor | None, config: Sequence[int], sums: int = 2, backward: bool = False
) -> Shared:
    """For the kernels of a pass that take so many sums."""
    channels = x.shape[1]
    rows = x.numel() // channels
    found: Plan = plan(rows, channels, BatchNormConfig(*config) if config else None, backward)
    partials = torch.empty((sums, found.groups, channels), dtype=torch.float32, device=x.device)
    if counters is None:
        counters = x.new_zeros(found.blocks, dtype=torch.int32)
    early = launches_early(x)
    options = {"ROWS": found.rows, "CHANNELS": CHANNELS, "EARLY": early, "num_warps": found.warps}
    sizes = (rows, channels, found.groups, found.rows_each)
    parts = parts_at_a_time(found.warps, sums)
    return Shared((found.blocks, found.groups), partials, counters, sizes, options | launch_options(early), parts)
