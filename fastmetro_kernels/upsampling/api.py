"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.sparse import SparseMatrix
from fastmetro_kernels.upsampling import native, ops, reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.upsample,
    "triton": ops.upsample_triton,
    "native": ops.upsample_native,
}
_ORDER = ("native", "triton", "reference")

_Arrays = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""A matrix as the backends take it: row_offsets, columns, values, ell_columns, ell_values; for native point_tables."""

_Sizes = tuple[list[int], list[int]]
"""point_cuts of a matrix and of its transpose."""


def sparse_upsample(x: Tensor, matrix: SparseMatrix, backend: str = "auto") -> Tensor:
    """Multiply every element of a batch by one constant sparse matrix: ``out[b] = matrix @ x[b]``.

    This is the coarse-to-fine step of mesh transformers (FastMETRO, ECCV 2022, section 3.3, V' = U V), where ``x``
    holds 3D vertices, but any number of channels may be given.

    Sums are taken in float32 (float64 for float64 ``x``) in a fixed order without atomics: forward and backward give
    the same bits in every run. The product is linear, so that its backward is the product with the transposed matrix
    and derivatives of any order exist on every backend; the matrix itself is constant. Autocast does not change the
    dtype: vertices stay in the precision they come in. A stored value multiplies what it meets, so that NaN and
    infinity in ``x`` reach exactly the rows whose entries name them, also entries that are explicit zeros.

    Args:
        x: ``[B, N, C]`` float32, float16, bfloat16 or float64, any strides (batch stride 0 included), B, N, C >= 0.
        matrix: M x N, on the device of ``x``.
        backend: ``"auto"`` (the fastest that can run), ``"reference"``, ``"triton"`` or ``"native"``. float64 runs on
            ``reference``, and on ``native`` for CPU tensors.

    Returns:
        ``[B, M, C]``, contiguous, in the dtype of ``x``. Rows of the matrix without entries give zeros.

    Raises:
        TypeError: ``x`` is not a dense tensor of an accepted dtype, or ``matrix`` is not a SparseMatrix.
        ValueError: shapes or devices do not fit, a tensor of the matrix requires grad, or the backend is not known.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    _check_input(x, matrix)
    chosen = _choose(backend, x.device, x.dtype)
    m = matrix
    if x.dtype == torch.float64:
        forward: _Arrays = (m.row_offsets, m.columns, m.values64, None, None, None)
        transpose: _Arrays = (m.t_row_offsets, m.t_columns, m.t_values64, None, None, None)
        sizes: _Sizes = ([], [])
    else:
        forward = (m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.point_tables)
        transpose = (m.t_row_offsets, m.t_columns, m.t_values, m.t_ell_columns, m.t_ell_values, m.t_point_tables)
        sizes = (m.point_cuts, m.t_point_cuts)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, matrix.shape, chosen, sizes, *forward, *transpose)
    return _product(chosen, x, forward, matrix.shape[0], sizes[0])


def _product(backend: str, x: Tensor, arrays: Sequence[Tensor | None], rows: int, sizes: list[int]) -> Tensor:
    point_tables = (arrays[5], sizes) if backend == "native" else ()
    return _PRODUCTS[backend](x, *arrays[:5], rows, *point_tables)


class _Product(torch.autograd.Function):
    """The product with one matrix; its backward is the product with the transpose, differentiable in turn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, int], backend: str, sizes: _Sizes, *arrays: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*arrays)
        ctx.matrix_shape, ctx.backend, ctx.sizes = shape, backend, sizes
        return _product(backend, x, arrays[:6], shape[0], sizes[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arrays, (rows, columns), sizes = ctx.saved_tensors, ctx.matrix_shape, ctx.sizes
        if torch.is_grad_enabled() and grad.requires_grad:
            grad_x = _Product.apply(grad, (columns, rows), ctx.backend, sizes[::-1], *arrays[6:], *arrays[:6])
        else:
            grad_x = _product(ctx.backend, grad, arrays[6:], columns, sizes[1])
        return grad_x, *[None] * 15


@assumed_constant
def _choose(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    triton = list(backends.triton_reasons(device))
    if dtype == torch.float64:
        triton.append("float64 is not supported")
    if dtype == torch.bfloat16 and device.type == "cpu":
        triton.append("Triton's interpreter truncates to bfloat16 instead of rounding")
    why = {"reference": [], "triton": triton, "native": native.reasons(device, dtype)}
    order = [name for name in _ORDER if not (name == "triton" and backends.triton_interpreted())]
    return backends.select("sparse_upsample", requested, why, order)


def _check_input(x: Tensor, matrix: SparseMatrix) -> None:
    if not isinstance(matrix, SparseMatrix):
        raise TypeError(
            f"matrix: expected a SparseMatrix, got {type(matrix).__name__}; "
            "build one with SparseMatrix.from_scipy, from_dense or from_torch"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got layout {x.layout}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() != 3 or x.shape[1] != matrix.shape[1]:
        raise ValueError(
            f"x: expected shape [B, {matrix.shape[1]}, C] for a matrix of shape {matrix.shape}, got {tuple(x.shape)}"
        )
    if x.device != matrix.columns.device:
        raise ValueError(
            f"matrix: expected on {x.device} like x, but it is on {matrix.columns.device}; move it with matrix.to(...)"
        )
    if matrix.values.requires_grad or matrix.values64.requires_grad:
        raise ValueError("matrix: its values are constants, but they require grad; call requires_grad_(False) on them")
