"""The linear layer that needs compute capability 9.0, run in the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from emulation import build
from torch import Tensor

from fastmetro_kernels.fused import NativeLinearConfig

POINTERS = ("x", "weight", "bias", "residual", "leading", "out", "moments", "sums", "moments_out")
NUMBERS = (
    *("rows", "width", "features", "tokens", "parts", "leads", "relu"),
    *("columns", "split", "stages", "bfloat"),
)


class Given(ctypes.Structure):
    """Arguments of the layer, as in linear_harness.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("epsilon", ctypes.c_double),
    ]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: NativeLinearConfig,
    residual: Tensor | None = None,
    leading: Tensor | None = None,
    moments: Tensor | None = None,
    sums: Tensor | None = None,
    relu: bool = False,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Output [leads + rows, N] and its moments float32 [leads + rows, tiles, 3]; what the kernel leaves out is NaN.

    ``x`` [rows, K], ``weight`` [N, K], ``bias`` [N] or [tokens, N]; the others as ``fused_linear_native`` has them.
    """
    leads, features = 0 if leading is None else len(leading), len(weight)
    out = x.new_full((leads + len(x), features), torch.nan)
    made = torch.full((len(out), -(-features // config.columns), 3), torch.nan)
    inputs = dict(zip(POINTERS, (x, weight, bias, residual, leading, None, moments, sums), strict=False))
    outputs = {"out": out, "moments_out": made}
    there = {name: one for name, one in inputs.items() if one is not None}
    numbers = (
        *(len(x), x.shape[1], features, 0 if bias.dim() == 1 else len(bias)),
        *(0 if moments is None else moments.shape[1], leads, relu),
        *(config.columns, config.split, config.stages, x.dtype == torch.bfloat16),
    )
    given = Given(
        **{name: one.data_ptr() for name, one in (there | outputs).items()},
        **{name: int(number) for name, number in zip(NUMBERS, numbers, strict=True)},
        epsilon=epsilon,
    )
    harness = build.build_harness(Path(build.__file__).with_name("linear_harness.cpp"))
    harness.run("run_linear", given, reads=there, writes=outputs, **{"races": "by_barriers", **options})
    return out, made
