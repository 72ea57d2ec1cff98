"""Schemas and shape rules of the batch norm's ops; ``triton_forward.py``
and ``triton_backward.py``, imported by the first call, implement them.

They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.batch_norm.plan import CHANNELS, BatchNormConfig, problem
from fastmetro_kernels.images import is_channels_last

NAMESPACE = "fastmetro_kernels"

torch.library.define(
    f"{NAMESPACE}::batch_norm_triton",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? batches, Tensor(d!)? counters, float momentum, float epsilon, bool relu, bool bits, int[] config) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# `config` is a BatchNormConfig, or empty for the pinned one.
# `counters` are zeros, one for each CHANNELS channels, and zeros again afterwards: they belong to one call at a time.
# The last result of the forward pass is empty unless `bits` asks for it: of each block of CHANNELS channels, and of
# each row, a byte for eight channels, bit j of byte k of the block's channel 8 k + j, which is set where out > 0
# (channels that are not there have none). A ReLU with a residual in front of it needs them backward;
# without one, `bits` is None, and what it let through is made anew. The gradient is grad + more. The last result, the
# gradient in front of the ReLU, is empty unless `behind` asks for it, as it must where there are `bits`: the second
# kernel reads it.
torch.library.define(
    f"{NAMESPACE}::batch_norm_backward_triton",
    "(Tensor grad, Tensor? more, Tensor x, Tensor? bits, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
    "Tensor(a!)? counters, float epsilon, bool relu, bool behind, int[] config) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_tile(config: Sequence[int]) -> None:
    """Of both ops."""
    if config:
        found = problem(BatchNormConfig(*config)) if len(config) == 3 else f"three numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


def check_arguments(x: Tensor, images: dict[str, Tensor | None], vectors: dict[str, Tensor]) -> None:
    """Shape, stride and dtype rules of both ops, in a form that tracing understands."""
    torch._check(x.dim() == 4, lambda: f"x must be [B, C, H, W], got {tuple(x.shape)}")
    torch._check(x.dtype != torch.float64, lambda: "batch_norm_triton does not take float64")
    for name, image in ({"x": x} | images).items():
        if image is None:
            continue
        torch._check(image.shape == x.shape, lambda: f"{name} must be {tuple(x.shape)}, got {tuple(image.shape)}")  # noqa: B023
        torch._check(image.dtype == x.dtype, lambda: f"{name} must be {x.dtype}, got {image.dtype}")  # noqa: B023
        fits = is_channels_last(image)
        torch._check(fits, lambda: f"{name} must be contiguous in channels_last")  # noqa: B023
    for name, vector in vectors.items():
        fits = vector.shape == (x.size(1),) and vector.dtype == torch.float32 and vector.is_contiguous()
        torch._check(fits, lambda: f"{name} must be float32 [{x.size(1)}], contiguous")  # noqa: B023


def check_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, counters: Tensor | None,
) -> None:  # fmt: skip
    """All rules of the forward op."""
    vectors = {"weight": weight, "bias": bias}
    torch._check((running_mean is None) == (running_var is None), lambda: "both running averages, or none")
    if running_mean is not None and running_var is not None:
        vectors |= {"running_mean": running_mean, "running_var": running_var}
    check_arguments(x, {"residual": residual}, vectors)
    if batches is not None:
        fits = batches.numel() == 1 and batches.dtype == torch.int64
        torch._check(fits, lambda: "batches must be one int64")
    check_counters(x, counters)


def check_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, bits: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, counters: Tensor | None, relu: bool, behind: bool,
) -> None:  # fmt: skip
    """All rules of the backward op."""
    vectors = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    check_arguments(x, {"grad": grad, "more": more}, vectors)
    if bits is not None:
        check_bits(x, bits)
        torch._check(relu and behind, lambda: "relu and behind must be asked for where bits are given")
    check_counters(x, counters)


def bits_shape(x: Tensor) -> tuple[int, int, int]:
    """A byte for eight channels of each row, block of channels by block."""
    return -(-x.size(1) // CHANNELS), x.size(0) * x.size(2) * x.size(3), CHANNELS // 8


def check_bits(x: Tensor, bits: Tensor) -> None:
    """Of the backward op."""
    shape = bits_shape(x)
    fits = bits.shape == shape and bits.dtype == torch.uint8 and bits.is_contiguous()
    torch._check(fits, lambda: f"bits must be uint8 {shape}, contiguous")


def check_counters(x: Tensor, counters: Tensor | None) -> None:
    """Of both ops."""
    if counters is not None:
        least = -(-x.size(1) // CHANNELS)
        fits = counters.dtype == torch.int32 and counters.is_contiguous() and counters.numel() >= least
        torch._check(fits, lambda: f"counters must be int32, contiguous, at least {least}")


@torch.library.register_fake(f"{NAMESPACE}::batch_norm_triton")
def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, counters: Tensor | None, momentum: float, epsilon: float,
    relu: bool, bits: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_forward(x, residual, weight, bias, running_mean, running_var, batches, counters)
    check_tile(config)
    let = x.new_empty(bits_shape(x) if bits else 0, dtype=torch.uint8)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), let


@torch.library.register_fake(f"{NAMESPACE}::batch_norm_backward_triton")
def _fake_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, bits: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, counters: Tensor | None, epsilon: float, relu: bool, behind: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_tile(config)
    check_backward(grad, more, x, bits, weight, bias, mean, variance, counters, relu, behind)
    before = torch.empty_like(x) if behind else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), before


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, counters: Tensor | None, momentum: float, epsilon: float,
    relu: bool, bits: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastmetro_kernels.batch_norm import triton_forward

    return triton_forward.forward(
        x, residual, weight, bias, running_mean, running_var, batches, counters, momentum, epsilon, relu, bits, config
    )  # fmt: skip


def _backward(
    grad: Tensor, more: Tensor | None, x: Tensor, bits: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, counters: Tensor | None, epsilon: float, relu: bool, behind: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastmetro_kernels.batch_norm import triton_backward

    return triton_backward.backward(
        grad, more, x, bits, weight, bias, mean, variance, counters, epsilon, relu, behind, config
    )  # fmt: skip


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::batch_norm_triton", _device, _forward)
    torch.library.impl(f"{NAMESPACE}::batch_norm_backward_triton", _device, _backward)

batch_norm_triton = torch.ops.fastmetro_kernels.batch_norm_triton.default
batch_norm_backward_triton = torch.ops.fastmetro_kernels.batch_norm_backward_triton.default
