"""The second launch of sums over rows in Triton: joins what the programs of the first one found, in a fixed order."""

# mypy: disable-error-code="no-untyped-def"
# (kernels are not ordinary Python: their arguments are typed when Triton compiles them)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastmetro_kernels.fused.early_launch import await_earlier_kernels

PARTS = 256
"""Programs' sums that a joining program adds up at a time."""
COLUMNS = 16
"""Of a joining program."""
WARPS = 8


@triton.jit(do_not_specialize=["groups"])
def column_sums_kernel(
    partials, first, second, third, width, groups,
    COUNT: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sums of all groups, of a few columns of one of the COUNT results."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < width
    place = tl.program_id(1)
    source = partials + place.to(tl.int64) * groups * width
    await_earlier_kernels(EARLY)
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, groups, PARTS):
        group = start + tl.arange(0, PARTS)
        inside = (group < groups)[:, None] & known[None, :]
        offset = group.to(tl.int64)[:, None] * width + c[None, :]
        sums += tl.load(source + offset, mask=inside, other=0.0)
    found = tl.sum(sums, 0)
    if place == 0:
        tl.store(first + c, found, mask=known)
    if COUNT > 1:  # noqa: SIM102 - one is known when it is compiled
        if place == 1:
            tl.store(second + c, found, mask=known)
    if COUNT > 2:  # noqa: SIM102
        if place == 2:
            tl.store(third + c, found, mask=known)


def join(partials: Tensor, results: Sequence[Tensor], options: dict[str, Any]) -> None:
    """Sum ``[len(results), groups, C]`` over the groups into the results, one to three of ``[C]``; all float32.

    `options` are those of the launch: EARLY and what goes with it.
    """
    count, groups, width = partials.shape
    places = [results[place] if place < count else None for place in range(3)]
    column_sums_kernel[(triton.cdiv(width, COLUMNS), count)](
        partials, *places, width, groups, COUNT=count, PARTS=PARTS, COLUMNS=COLUMNS, num_warps=WARPS, **options
    )
