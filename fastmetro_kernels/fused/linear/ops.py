"""Schema and shape rules of the fused linear layer; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.fused.linear.configs import LinearConfig, problem

NAMESPACE = "fastmetro_kernels"

# `config` is a LinearConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::fused_linear_triton",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? leading, float? normalize, Tensor? weight_sums, "
    "bool relu, ScalarType out_dtype, bool constant_weights, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
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
    named = {"weight": weight, "bias": bias, "residual": residual, "leading": leading, "weight_sums": weight_sums}
    for name, tensor in named.items():
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
        torch._check(residual is None, lambda: "residual and leading do not go together")
        torch._check(
            leading.dim() == 3 and leading.size(0) == batch and leading.size(2) == features and leading.size(1) > 0,
            lambda: f"leading must be [{batch}, P, {features}] with P of at least 1, got {tuple(leading.shape)}",
        )
    if weight_sums is not None:
        torch._check(normalize is not None, lambda: "weight_sums are of use with normalize alone")
        one_each = tuple(weight_sums.shape) == (features,) and weight_sums.is_contiguous()
        torch._check(
            weight_sums.dtype == torch.float32 and one_each,
            lambda: f"weight_sums must be float32 [{features}], contiguous, got {weight_sums.dtype} "
            f"{tuple(weight_sums.shape)}",
        )
    if config:
        torch._check(len(config) == len(LinearConfig._fields), lambda: f"config must be a LinearConfig, got {config}")
        found = problem(LinearConfig(*config))
        torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::fused_linear_triton")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
    weight_sums: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    check_arguments(x, weight, bias, residual, leading, normalize, weight_sums, config)
    tokens = x.size(1) + (0 if leading is None else leading.size(1))
    return x.new_empty((x.size(0), tokens, weight.size(0)), dtype=out_dtype)


def _fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
    weight_sums: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    from fastmetro_kernels.fused.linear import triton

    options = (relu, out_dtype, constant_weights, config)
    return triton.linear(x, weight, bias, residual, leading, normalize, weight_sums, *options)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::fused_linear_triton", _device, _fused_linear_triton)

fused_linear_triton = torch.ops.fastmetro_kernels.fused_linear_triton.default
