"""Schemas and shape rules of the upsampling ops.

``csrc/upsampling/`` implements ``upsample_native`` for CPU and CUDA; ``triton.py``, which is imported by the first
call, implements ``upsample_triton``. The native op also takes the tables of ``points.py``, which CUDA uses for large
batches of points.
Both compute ``out[b, m, :] = sum_e values[e] * x[b, columns[e], :]`` over the entries e of row m. The same op serves
the backward, with the arrays of the transpose. They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMESPACE = "fastmetro_kernels"
_ARGUMENTS = (
    "(Tensor x, Tensor row_offsets, Tensor columns, Tensor values, Tensor? ell_columns, Tensor? ell_values, int rows)"
)


def check_list(name: str, tensor: Tensor | None, dims: int, dtype: torch.dtype, device: torch.device) -> None:
    """Axes, dtype and device of one array of the matrix; None passes."""
    if tensor is None:
        return
    torch._check(tensor.dim() == dims, lambda: f"{name} must have {dims} axes, got {tuple(tensor.shape)}")
    torch._check(tensor.dtype == dtype, lambda: f"{name} must be {dtype}, got {tensor.dtype}")
    torch._check(tensor.device == device, lambda: f"{name} must be on {device}, got {tensor.device}")


def check_arguments(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    ell_columns: Tensor | None,
    ell_values: Tensor | None,
    rows: int,
) -> None:
    """Shape, dtype and device rules of both ops, in a form that tracing understands."""
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {tuple(x.shape)}")
    value_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_list("row_offsets", row_offsets, 1, torch.int32, x.device)
    check_list("columns", columns, 1, torch.int32, x.device)
    check_list("values", values, 1, value_dtype, x.device)
    check_list("ell_columns", ell_columns, 2, torch.int32, x.device)
    check_list("ell_values", ell_values, 2, torch.float32, x.device)
    torch._check(row_offsets.size(0) == rows + 1, lambda: f"row_offsets must have {rows + 1} elements")
    torch._check(columns.size(0) == values.size(0), lambda: "columns and values must have one length")
    torch._check((ell_columns is None) == (ell_values is None), lambda: "ell_columns and ell_values come together")
    if ell_columns is not None and ell_values is not None:
        torch._check(x.dtype != torch.float64, lambda: "the padded table is for float32 sums")
        torch._check(ell_columns.size(0) == rows, lambda: f"ell_columns must have {rows} rows")
        torch._check(ell_columns.shape == ell_values.shape, lambda: "ell_columns and ell_values must have one shape")


def _fake(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    ell_columns: Tensor | None,
    ell_values: Tensor | None,
    rows: int,
    point_tables: Tensor | None = None,
    point_cuts: Sequence[int] = (),
) -> Tensor:
    check_arguments(x, row_offsets, columns, values, ell_columns, ell_values, rows)
    check_list("point_tables", point_tables, 1, torch.int32, x.device)
    return x.new_empty((x.size(0), rows, x.size(2)))


_NATIVE_ARGUMENTS = f"{_ARGUMENTS[:-1]}, Tensor? point_tables=None, int[] point_cuts=[])"
for _name, _arguments in (("upsample_native", _NATIVE_ARGUMENTS), ("upsample_triton", _ARGUMENTS)):
    torch.library.define(f"{NAMESPACE}::{_name}", f"{_arguments} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)

# upsample_native on CUDA in a configuration of the caller's instead of the pinned one, for benchmarks and tests; the
# fields are those of Plan in csrc/upsampling/launch.h, and the kernel for points takes the first of the cuts.
torch.library.define(
    f"{NAMESPACE}::upsample_native_as",
    f"{_ARGUMENTS[:-1]}, Tensor? point_tables, int[] point_cuts, int kernel, int batch_tile, int threads, bool early)"
    " -> Tensor",
)


def _upsample_triton(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    ell_columns: Tensor | None,
    ell_values: Tensor | None,
    rows: int,
) -> Tensor:
    from fastmetro_kernels.upsampling import triton

    return triton.upsample(x, row_offsets, columns, values, ell_columns, ell_values, rows)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::upsample_triton", _device, _upsample_triton)

upsample_native = torch.ops.fastmetro_kernels.upsample_native.default
upsample_native_as = torch.ops.fastmetro_kernels.upsample_native_as.default
upsample_triton = torch.ops.fastmetro_kernels.upsample_triton.default
