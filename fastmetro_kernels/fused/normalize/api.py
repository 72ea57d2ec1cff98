"""The public op: checks, the choice of a backend, and the axes before the last two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmetro_kernels.fused.inference import (
    DTYPES,
    check_config,
    check_epsilon,
    check_tensor,
    choose_backend,
    refuse_gradients,
)
from fastmetro_kernels.fused.normalize import ops, reference
from fastmetro_kernels.fused.normalize.configs import NormalizeConfig, problem


def normalize_rows(
    x: Tensor,
    epsilon: float = 1e-5,
    *,
    shift: Tensor | None = None,
    marks: int = 0,
    config: NormalizeConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """A layer norm without gain and bias (Ba et al. 2016): ``(x - mean) / sqrt(variance + epsilon)`` of each row.

    For inference: it has no gradients. Gain and bias are folded into the layer that reads the rows. Moments are taken
    in float32 (float64 for float64 x), the result is rounded once. Autocast changes nothing.

    Args:
        x: ``[..., M, K]``, float32, float16, bfloat16 or (reference) float64; any strides, also a slice of the tokens
            or a batch stride of 0. Rows of more than 16,384 numbers run on the reference.
        epsilon: Finite, at least 0.
        shift: float32 (float64 for float64 x) ``[K]``, added to each row first: for instance biases that the layers
            that made the rows left out.
        marks: so many further numbers behind each row, at least M or 0: 1 at the place of the row among its M, else 0.
            A product with ``[weight, bias.T]``, ``[N, K + marks]``, then adds a bias per token.
        config: The tile of the Triton kernel instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[..., M, K + marks]`` in the dtype of x, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    check_tensor("x", x, DTYPES)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., M, K] with K of at least 1, got {list(x.shape)}")
    check_epsilon("epsilon", epsilon)
    check_config(config, NormalizeConfig, problem)
    if shift is not None:
        check_tensor("shift", shift, (torch.promote_types(x.dtype, torch.float32),), x.device)
        if shift.shape != x.shape[-1:]:
            raise ValueError(f"shift must be [{x.shape[-1]}], got {list(shift.shape)}")
        shift = shift.contiguous()
    if isinstance(marks, bool) or not isinstance(marks, int) or (marks and marks < x.shape[-2]):
        raise ValueError(f"marks must be 0 or a whole number of at least {x.shape[-2]}, got {marks!r}")
    refuse_gradients("normalize_rows", {"x": x, "shift": shift})
    chosen = choose_backend("normalize_rows", backend, x.device, x.dtype)
    if x.shape[-1] > ops.MAX_WIDTH:
        if backend == "triton":
            raise ValueError(f"x must have at most {ops.MAX_WIDTH} features with backend='triton', got {x.shape[-1]}")
        chosen = "reference"
    rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    if chosen == "reference":
        out = reference.normalize(rows, shift, epsilon, marks)
    else:
        out = ops.normalize_rows_triton(rows, shift, epsilon, marks, config or ())
    return out.view(*x.shape[:-1], x.shape[-1] + marks)
