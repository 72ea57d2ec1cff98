"""Schemas and shape rules of the ops for two batch norms whose results are added; ``triton_joint.py``, imported by the
first call, implements them.

They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastmetro_kernels.batch_norm import ops
from fastmetro_kernels.batch_norm.ops import NAMESPACE

Running = tuple[Tensor | None, Tensor | None, Tensor | None]

# `config`, `counters` and `bits` are as in ops.py. Results: out, the moments of x and of residual, and the bits.
torch.library.define(
    f"{NAMESPACE}::batch_norm_joint_triton",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor residual_weight, Tensor residual_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, "
    "Tensor(d!)? residual_running_mean, Tensor(e!)? residual_running_var, Tensor(f!)? residual_batches, "
    "float residual_momentum, Tensor(g!)? counters, float epsilon, float residual_epsilon, bool relu, bool bits, "
    "int[] config) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient is grad + more, and `bits` are those of a ReLU, if there was one. Results: the gradients of x and
# residual, of weight and bias, and of the residual's weight and bias.
torch.library.define(
    f"{NAMESPACE}::batch_norm_joint_backward_triton",
    "(Tensor grad, Tensor? more, Tensor x, Tensor residual, Tensor? bits, Tensor weight, Tensor mean, Tensor variance, "
    "Tensor residual_weight, Tensor residual_mean, Tensor residual_variance, Tensor(a!)? counters, float epsilon, "
    "float residual_epsilon, int[] config) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, residual_weight: Tensor, residual_bias: Tensor,
    running: Running, residual_running: Running, counters: Tensor | None,
) -> None:  # fmt: skip
    """All rules of the forward op."""
    ops.check_forward(x, residual, weight, bias, *running, counters)
    ops.check_forward(residual, None, residual_weight, residual_bias, *residual_running, counters)


def check_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, residual: Tensor, bits: Tensor | None, weight: Tensor, mean: Tensor,
    variance: Tensor, residual_weight: Tensor, residual_mean: Tensor, residual_variance: Tensor,
    counters: Tensor | None,
) -> None:  # fmt: skip
    """All rules of the backward op."""
    vectors = {"weight": weight, "mean": mean, "variance": variance, "residual_weight": residual_weight,
               "residual_mean": residual_mean, "residual_variance": residual_variance}  # fmt: skip
    ops.check_arguments(x, {"grad": grad, "more": more, "residual": residual}, vectors)
    if bits is not None:
        ops.check_bits(x, bits)
    ops.check_counters(x, counters)


@torch.library.register_fake(f"{NAMESPACE}::batch_norm_joint_triton")
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, residual_weight: Tensor, residual_bias: Tensor,
    running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float,
    residual_running_mean: Tensor | None, residual_running_var: Tensor | None, residual_batches: Tensor | None,
    residual_momentum: float, counters: Tensor | None, epsilon: float, residual_epsilon: float, relu: bool, bits: bool,
    config: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    others = residual_running_mean, residual_running_var, residual_batches
    own = running_mean, running_var, batches
    check_forward(x, residual, weight, bias, residual_weight, residual_bias, own, others, counters)
    ops.check_tile(config)
    let = x.new_empty(ops.bits_shape(x) if bits else 0, dtype=torch.uint8)
    return torch.empty_like(x), *(torch.empty_like(weight) for _ in range(4)), let


@torch.library.register_fake(f"{NAMESPACE}::batch_norm_joint_backward_triton")
def _fake_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, residual: Tensor, bits: Tensor | None, weight: Tensor, mean: Tensor,
    variance: Tensor, residual_weight: Tensor, residual_mean: Tensor, residual_variance: Tensor,
    counters: Tensor | None, epsilon: float, residual_epsilon: float, config: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    ops.check_tile(config)
    others = residual_weight, residual_mean, residual_variance
    check_backward(grad, more, x, residual, bits, weight, mean, variance, *others, counters)
    return torch.empty_like(x), torch.empty_like(x), *(torch.empty_like(weight) for _ in range(4))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastmetro_kernels.batch_norm import triton_joint

    return cast("tuple[Tensor, ...]", triton_joint.forward(*arguments))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastmetro_kernels.batch_norm import triton_joint

    return cast("tuple[Tensor, ...]", triton_joint.backward(*arguments))


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::batch_norm_joint_triton", _device, _forward)
    torch.library.impl(f"{NAMESPACE}::batch_norm_joint_backward_triton", _device, _backward)

batch_norm_joint_triton = torch.ops.fastmetro_kernels.batch_norm_joint_triton.default
batch_norm_joint_backward_triton = torch.ops.fastmetro_kernels.batch_norm_joint_backward_triton.default
