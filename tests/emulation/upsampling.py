"""The CUDA kernels of ``csrc/upsampling`` on CPU tensors, through the emulator, with the arguments of the op."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from emulation import build
from torch import Tensor

from fastmetro_kernels.points import Cut

KIB = 1024
GATHER, STAGED, POINTS = range(3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Plan(NamedTuple):
    """One configuration, as ``Plan`` in ``csrc/upsampling/launch.h``; ``threads`` 0 leaves the choice to the launch."""

    kernel: int
    batch_tile: int
    threads: int = 0


class _Arguments(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "tokens", "channels", "batch_stride", "token_stride", "channel_stride"),
            *("rows", "entries", "three_each", "dtype"),
            *("kernel", "batch_tile", "threads", "multiprocessors", "shared_limit", "cuts"),
        )
    ]


class Choice(ctypes.Structure):
    """What the op chooses; ``packs``: how many a block of the points kernel goes through."""

    kernel: int
    batch_tile: int
    cut: int
    packs: int
    _fields_ = [(name, ctypes.c_int64) for name in ("kernel", "batch_tile", "cut", "packs")]


@functools.cache
def harness() -> build.Harness:
    """The compiled kernels."""
    return build.build_harness(Path(build.__file__).with_name("upsampling_harness.cpp"))


def upsample(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    ell_columns: Tensor | None,
    ell_values: Tensor | None,
    rows: int,
    point_tables: Tensor | None = None,
    point_cuts: Sequence[int] = (),
    *,
    plan: Plan | None = None,
    multiprocessors: int = 4,
    shared_limit: int = 227 * KIB,
    schedule: str = "forward",
    choice: Choice | None = None,
) -> Tensor:
    """``upsample_native``; without a plan in the configuration that the op would choose.

    Given a ``choice`` to fill it runs nothing.

    Raises:
        EmulationError: the kernel did something wrong, or there is none for this plan.
    """
    batch, tokens, channels = x.shape
    storage = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    source = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), (storage // x.element_size(),))
    out = torch.full((batch, rows, channels), torch.nan, dtype=x.dtype)
    sizes = np.array(point_cuts, np.int64)
    arguments = _Arguments(
        *(batch, tokens, channels, *x.stride(), rows, columns.numel()),
        ell_columns is not None and ell_columns.shape[1] == 3 and columns.numel() == 3 * rows,
        DTYPES.index(x.dtype),
        *((-1, 0, 0) if plan is None else plan),
        *(multiprocessors, shared_limit, len(sizes) // len(Cut._fields)),
    )
    harness().run(
        "run_upsampling",
        *(arguments, source, out, row_offsets, columns, values, point_tables, sizes, choice),
        reads={
            **{"x": source, "row_offsets": row_offsets, "columns": columns, "values": values},
            **({} if point_tables is None else {"point_tables": point_tables}),
        },
        writes={"out": out},
        schedule=schedule,
        shared_limit=shared_limit,
    )
    return out
