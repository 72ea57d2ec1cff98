"""The random numbers of ``random.py`` in Triton kernels."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_halves(seed, low, high):
    """16-bit random numbers [..., 2, 2, 2] (as int32) of counters [...]: eight in a row to each.

    The words are put in order by register names alone: a thread that has eight elements next to one another computes
    one call for them.
    """
    c0 = low.to(tl.uint32)
    c1 = high.to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2]: word 2 a + b at [a, b]
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def kept_factors(seed, rows, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What elements [ROWS, BLOCK] of these rows, from column 0 on, are multiplied by: the scale, or 0."""
    group = tl.arange(0, BLOCK // 8)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    row = rows[:, None] + tl.zeros([1, BLOCK // 8], tl.int32)
    halves = tl.reshape(random_halves(seed, group, row), [ROWS, BLOCK])
    return tl.where(halves >= threshold, scale, 0.0)


@triton.jit
def kept_factors_of_part(seed, group, threshold, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of elements [ROWS, COLUMNS] of one long row cut into rows, their groups [ROWS, COLUMNS // 8] (int64)."""
    halves = tl.reshape(random_halves(seed, group, group >> 32), [ROWS, COLUMNS])
    return tl.where(halves >= threshold, scale, 0.0)


@triton.jit
def kept_factors_of_line(seed, group, threshold, scale, BLOCK: tl.constexpr):
    """The same of BLOCK elements of one long row, of which these are the groups [BLOCK // 8] (int64)."""
    halves = tl.reshape(random_halves(seed, group, group >> 32), [BLOCK])
    return tl.where(halves >= threshold, scale, 0.0)
