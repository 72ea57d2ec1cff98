"""The public op: checks, the choice of a backend, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.fused.inference import DTYPES, check_config, check_tensor, choose_backend
from fastmetro_kernels.max_pool import ops, reference
from fastmetro_kernels.max_pool.plan import MaxPoolConfig, problem


def max_pool(x: Tensor, *, config: MaxPoolConfig | None = None, backend: str = "auto") -> Tensor:
    """The maximum of each 3 x 3 window, 2 apart, with a padding of 1: ``F.max_pool2d(x, 3, stride=2, padding=1)``.

    A NaN is the maximum of its window. The gradient of a maximum goes to the first position of its window, row by
    row, that holds it, or to the last that holds NaN, as PyTorch's does. (But for two corners: of zeros with either
    sign a positive one is returned; and PyTorch on CUDA in channels_last gives the gradient of a window of nothing but
    -inf to the first position of the image.) What a position gets from several windows is summed in float32 in a fixed
    order: equal calls give equal bits. Kept for the backward pass is one byte per result. Derivatives of the first
    order only. Autocast changes nothing.

    Args:
        x: ``[B, C, H, W]`` with C, H, W >= 1; float32, float16, bfloat16 or (reference) float64. Other memory formats
            than channels_last are copied first.
        config: the tile of the Triton kernels instead of the pinned ones, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, C, (H + 1) // 2, (W + 1) // 2]`` in the dtype of x, channels_last.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no image, or an empty one; an unknown backend.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    return cast(Tensor, _run(x, config, backend, twice=False))


def max_pool_twice(x: Tensor, *, config: MaxPoolConfig | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """:func:`max_pool` for two that take its result, as the first block of a residual network and its shortcut do.

    Returns:
        The result two times, on the same memory. The gradients of both are added on the way, without a kernel and a
        tensor for their sum.
    """
    return cast("tuple[Tensor, Tensor]", _run(x, config, backend, twice=True))


def _run(x: Tensor, config: MaxPoolConfig | None, backend: str, *, twice: bool) -> Any:
    check_tensor("x", x, DTYPES)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have channels, rows and columns, got {list(x.shape)}")
    check_config(config, MaxPoolConfig, problem)
    x = x.contiguous(memory_format=torch.channels_last)
    if _choose(backend, x.device, x.dtype) == "reference":
        out = reference.forward(x)
        return (out, out.view_as(out)) if twice else out
    return _MaxPool.apply(x, twice, config or ())


@assumed_constant
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("max_pool", backend, device, dtype)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, twice: bool, config: Sequence[int]) -> Tensor | tuple[Tensor, Tensor]:
        out, places = ops.max_pool_triton(x, config)
        ctx.save_for_backward(places)
        ctx.size, ctx.dtype, ctx.config = x.shape[2:], x.dtype, config
        ctx.set_materialize_grads(False)
        return (out, out.detach()) if twice else out

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, None, None]:
        (places,) = ctx.saved_tensors
        found = [one.to(ctx.dtype).contiguous(memory_format=torch.channels_last) for one in given if one is not None]
        if not found:
            return None, None, None
        grad, more = found[0], found[1] if len(found) > 1 else None
        return ops.max_pool_backward_triton(grad, more, places, *ctx.size, ctx.config), None, None
