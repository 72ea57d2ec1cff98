"""The native batch norm, which needs compute capability 9.0, run in the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from emulation import build
from torch import Tensor

POINTERS = (
    "x", "residual", "out", "grad", "more", "behind", "grad_x", "weight", "bias", "mean", "variance", "running_mean",
    "running_var", "grad_weight", "grad_bias", "batches",
)  # fmt: skip
SIZES = ("rows", "channels", "held", "lanes", "cluster", "relu", "bfloat")
Found = dict[str, Tensor]


class Given(ctypes.Structure):
    """As in batch_norm_harness.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_double) for name in ("momentum", "epsilon")),
    ]


def _run(
    function: str, reads: dict[str, Tensor | None], writes: dict[str, Tensor | None], numbers: dict[str, float],
    options: dict[str, Any],
) -> None:  # fmt: skip
    x = reads["x"]
    assert x is not None
    there = {name: one for name, one in (reads | writes).items() if one is not None}
    assert all(one.is_contiguous() for one in there.values())
    sizes = {"rows": x.shape[0], "channels": x.shape[1], "bfloat": int(x.dtype == torch.bfloat16)}
    given = Given(**{name: one.data_ptr() for name, one in there.items()}, **sizes, **numbers)
    harness = build.build_harness(Path(build.__file__).with_name("batch_norm_harness.cpp"))
    named = [{name: one for name, one in some.items() if one is not None} for some in (reads, writes)]
    harness.run(function, given, reads=named[0], writes=named[1], **options)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, config: tuple[int, int], *, residual: Tensor | None = None,
    relu: bool = False, running: tuple[Tensor, Tensor] | None = None, batches: Tensor | None = None,
    momentum: float = 0.1, epsilon: float = 1e-5, held: int = 99, **options: Any,
) -> Found:  # fmt: skip
    """``batch_norm_native`` of rows [N, C]: out, mean and variance; what the kernel leaves out is NaN.

    ``config``: lanes and blocks of a cluster. ``held``: at most so many sweeps stay in shared memory.
    """
    found = {"out": torch.full_like(x, torch.nan)}
    found |= {name: torch.full_like(weight, torch.nan) for name in ("mean", "variance")}
    averages = dict(zip(("running_mean", "running_var"), running or (None, None), strict=True))
    reads = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    numbers = {"lanes": config[0], "cluster": config[1], "held": held, "relu": int(relu), "momentum": momentum,
               "epsilon": epsilon}  # fmt: skip
    _run("run_forward", reads, found | averages | {"batches": batches}, numbers, options)
    return found


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, config: tuple[int, int], *,
    more: Tensor | None = None, out: Tensor | None = None, relu: bool = False, behind: bool = False,
    epsilon: float = 1e-5, held: int = 99, **options: Any,
) -> Found:  # fmt: skip
    """``batch_norm_backward_native`` likewise: grad_x, grad_weight, grad_bias and, where asked for, behind."""
    found = {name: torch.full_like(x, torch.nan) for name in ("grad_x", *(["behind"] if behind else []))}
    found |= {name: torch.full_like(weight, torch.nan) for name in ("grad_weight", "grad_bias")}
    reads = {"grad": grad, "more": more, "x": x, "out": out, "weight": weight, "bias": bias, "mean": mean,
             "variance": variance}  # fmt: skip
    numbers = {"lanes": config[0], "cluster": config[1], "held": held, "relu": int(relu), "epsilon": epsilon}
    _run("run_backward", reads, dict(found), numbers, options)
    return found
