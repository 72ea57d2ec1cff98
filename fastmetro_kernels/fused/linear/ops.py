"""Schema and shape rules of the fused linear layer; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels.fused.linear.configs import LinearConfig, pinned, problem

NAMESPACE = "fastmetro_kernels"

# `config` is a LinearConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::fused_linear_triton",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? leading, float? normalize, Tensor? moments, "
    "Tensor? weight_sums, bool relu, ScalarType out_dtype, bool give_moments, bool constant_weights, int[] config) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
    moments: Tensor | None,
    weight_sums: Tensor | None,
    config: Sequence[int],
) -> None:
    """Shape, dtype and device rules of the op, in a form that tracing understands."""
    torch._check(x.dim() == 3, lambda: f"x must be [B, M, K], got {tuple(x.shape)}")
    batch, tokens, width = x.shape
    torch._check(weight.dim() == 2, lambda: f"weight must be [N, K], got {tuple(weight.shape)}")
    torch._check(weight.size(1) == width, lambda: f"weight must be [N, {width}], got {tuple(weight.shape)}")
    torch._check(width > 0, lambda: f"x must have at least one feature, got {tuple(x.shape)}")
    torch._check(
        weight.dtype in (x.dtype, torch.float32),
        lambda: f"weight must be {x.dtype} like x or float32, got {weight.dtype}",
    )
    torch._check(x.dtype != torch.float64, lambda: "fused_linear_triton does not take float64")
    features = weight.size(0)
    named = {"weight": weight, "bias": bias, "residual": residual, "leading": leading}
    for name, tensor in (named | {"moments": moments, "weight_sums": weight_sums}).items():
        if tensor is not None:
            torch._check(tensor.device == x.device, lambda name=name: f"{name} must be on {x.device} like x")
    if bias is not None:
        torch._check(
            bias.dim() in (1, 2) and bias.size(-1) == features and (bias.dim() == 1 or bias.size(0) == tokens),
            lambda: f"bias must be [{features}] or [{tokens}, {features}], got {tuple(bias.shape)}",
        )
    if residual is not None:
        torch._check(
            residual.dim() == 3 and tuple(residual.shape) == (batch, tokens, features),
            lambda: f"residual must be [{batch}, {tokens}, {features}], got {tuple(residual.shape)}",
        )
    if leading is not None:
        torch._check(tokens > 0, lambda: f"x must have tokens where leading ones are given, got {tuple(x.shape)}")
        torch._check(residual is None, lambda: "residual and leading do not go together")
        torch._check(
            leading.dim() == 3 and leading.size(0) == batch and leading.size(2) == features and leading.size(1) > 0,
            lambda: f"leading must be [{batch}, P, {features}] with P of at least 1, got {tuple(leading.shape)}",
        )
    _check_moments(x, features, normalize, moments, weight_sums)
    if config:
        torch._check(len(config) == len(LinearConfig._fields), lambda: f"config must be a LinearConfig, got {config}")
        found = problem(LinearConfig(*config))
        torch._check(found is None, lambda: f"config: {found}")


def _check_moments(
    x: Tensor, features: int, normalize: float | None, moments: Tensor | None, weight_sums: Tensor | None
) -> None:
    torch._check((moments is None) == (weight_sums is None), lambda: "moments and weight_sums go together")
    if moments is None or weight_sums is None:
        return
    torch._check(normalize is not None, lambda: "moments are of use with normalize alone")
    torch._check(
        moments.dim() == 4 and moments.shape[:2] == x.shape[:2] and moments.size(2) > 0 and moments.size(3) == 3,
        lambda: f"moments must be [{x.size(0)}, {x.size(1)}, P, 3], got {tuple(moments.shape)}",
    )
    pieces = moments.stride(3) == 1 and (moments.size(2) == 1 or moments.stride(2) == 3)
    torch._check(
        moments.dtype == torch.float32 and pieces,
        lambda: f"moments must be float32 with the last two axes in one piece, got {moments.dtype} {moments.stride()}",
    )
    torch._check(
        weight_sums.dtype == torch.float32 and tuple(weight_sums.shape) == (features,) and weight_sums.stride(0) == 1,
        lambda: (
            f"weight_sums must be float32 [{features}], contiguous, got {weight_sums.dtype} {tuple(weight_sums.shape)}"
        ),
    )


def chosen_tile(x: Tensor, weight: Tensor, leading: int, config: Sequence[int]) -> LinearConfig:
    """The tile of a call; `leading`: tokens in front of each sample's."""
    if config:
        return LinearConfig(*config)
    rows = x.size(0) * (x.size(1) + leading)
    return pinned(rows, weight.size(0), x.size(2), weight.element_size())


def outputs(x: Tensor, weight: Tensor, leading: int, dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor]:
    """Memory for the result and its moments: three numbers per row and part of the features."""
    samples, tokens, features = x.size(0), x.size(1) + leading, weight.size(0)
    moments = x.new_empty((samples, tokens, parts, 3), dtype=torch.float32)
    return x.new_empty((samples, tokens, features), dtype=dtype), moments


@torch.library.register_fake(f"{NAMESPACE}::fused_linear_triton")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
    moments: Tensor | None,
    weight_sums: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    give_moments: bool,
    constant_weights: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:
    check_arguments(x, weight, bias, residual, leading, normalize, moments, weight_sums, config)
    more = 0 if leading is None else leading.size(1)
    parts = -(-weight.size(0) // chosen_tile(x, weight, more, config).columns) if give_moments else 0
    return outputs(x, weight, more, out_dtype, parts)


def _fused_linear_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastmetro_kernels.fused.linear import triton

    return triton.linear(*arguments)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::fused_linear_triton", _device, _fused_linear_triton)

fused_linear_triton = torch.ops.fastmetro_kernels.fused_linear_triton.default
