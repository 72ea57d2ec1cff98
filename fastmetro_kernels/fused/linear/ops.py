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
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float? normalize, bool relu, ScalarType out_dtype, "
    "bool constant_weights, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: Sequence[int]
) -> None:
    """Shape, dtype and device rules of the op, in a form that tracing understands."""
    torch._check(x.dim() == 3, lambda: f"x must be [B, M, K], got {tuple(x.shape)}")
    batch, tokens, width = x.shape
    torch._check(weight.dim() == 2, lambda: f"weight must be [N, K], got {tuple(weight.shape)}")
    torch._check(weight.size(1) == width, lambda: f"weight must be [N, {width}], got {tuple(weight.shape)}")
    torch._check(width > 0, lambda: f"x must have at least one feature, got {tuple(x.shape)}")
    torch._check(weight.dtype == x.dtype, lambda: f"weight must be {x.dtype} like x, got {weight.dtype}")
    torch._check(x.dtype != torch.float64, lambda: "fused_linear_triton does not take float64")
    features = weight.size(0)
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
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
    normalize: float | None,
    relu: bool,
    out_dtype: torch.dtype,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    check_arguments(x, weight, bias, residual, config)
    return x.new_empty((x.size(0), x.size(1), weight.size(0)), dtype=out_dtype)


def _fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    normalize: float | None,
    relu: bool,
    out_dtype: torch.dtype,
    constant_weights: bool,
    config: Sequence[int],
) -> Tensor:
    from fastmetro_kernels.fused.linear import triton

    return triton.linear(x, weight, bias, residual, normalize, relu, out_dtype, constant_weights, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::fused_linear_triton", _device, _fused_linear_triton)

fused_linear_triton = torch.ops.fastmetro_kernels.fused_linear_triton.default
