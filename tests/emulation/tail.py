"""The tail of a decoder layer that needs compute capability 9.0, run in the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from emulation import build
from torch import Tensor

from fastmetro_kernels.fused import TailWeights


class Rows(ctypes.Structure):
    """As in csrc/decoder_tail/problem.h."""

    _fields_ = [("data", ctypes.c_void_p), ("sample", ctypes.c_int64), ("row", ctypes.c_int64)]


class Given(ctypes.Structure):
    """Likewise."""

    _fields_ = [
        *((name, Rows) for name in ("tokens", "attended", "k", "v")),
        *((name, ctypes.c_void_p) for name in (*TailWeights._fields, "out")),
        *((name, ctypes.c_int64) for name in ("samples", "queries", "count", "hidden")),
        *((name, ctypes.c_double) for name in ("scale", "cross_epsilon", "feed_forward_epsilon")),
        ("constant_weights", ctypes.c_int64),
    ]


def tail(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, TailWeights],
    scale: float,
    blocks: int,
    cross_epsilon: float = 1e-5,
    feed_forward_epsilon: float = 1e-3,
    **options: Any,
) -> Tensor:
    """The result [B, L, 128], by so many blocks; what the kernel leaves out is NaN.

    ``inputs``: tokens, attended [B, L, 128], k, v [B, S, 8, 16], and weights, as of ``decoder_tail``.
    """
    tokens, attended, k, v, weights = inputs
    out = torch.full(tokens.shape, torch.nan, dtype=tokens.dtype)
    sizes = {"samples": len(tokens), "queries": tokens.shape[1], "count": k.shape[1], "hidden": len(weights[6])}
    rows = {"tokens": tokens, "attended": attended, "k": k, "v": v}
    given = Given(
        **{name: Rows(one.data_ptr(), one.stride(0), one.stride(1)) for name, one in rows.items()},
        **{name: one.data_ptr() for name, one in weights._asdict().items()},
        out=out.data_ptr(),
        **sizes,
        scale=scale, cross_epsilon=cross_epsilon, feed_forward_epsilon=feed_forward_epsilon, constant_weights=1,
    )  # fmt: skip
    reads = {name: _memory(one) for name, one in (rows | weights._asdict()).items()}
    harness = build.build_harness(Path(build.__file__).with_name("tail_harness.cpp"))
    bfloat = int(tokens.dtype == torch.bfloat16)
    harness.run(
        "run_tail", given, blocks, bfloat, reads=reads, writes={"out": out}, **{"races": "by_barriers", **options}
    )
    return out


def _memory(tensor: Tensor) -> Tensor:
    """From the tensor's first number to its last one, as one row: what a kernel may touch."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))
