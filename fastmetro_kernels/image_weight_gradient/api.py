"""The public op: checks and the choice of a backend."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.fused.inference import DTYPES, check_config, check_tensor, choose_backend, refuse_gradients
from fastmetro_kernels.image_weight_gradient import ops, reference
from fastmetro_kernels.image_weight_gradient.plan import ImageWeightGradientConfig, problem, unfit

_HALVES = (torch.float16, torch.bfloat16)


def image_weight_gradient(
    x: Tensor,
    grad: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    config: ImageWeightGradientConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gradient of the weight of ``F.conv2d(x, weight, stride=stride, padding=padding)``, a convolution of images.

    A matrix product with as many rows as the result has channels, as many columns as the weight has numbers for each,
    and a depth of all positions. Products are summed in float32, by each program over its positions, then over the
    programs in a fixed order, and rounded once: equal calls give equal bits. It has no gradients of its own.

    Args:
        x: ``[B, C, H, W]``; float32, float16, bfloat16 or (reference) float64. Triton takes ``kernel <= 7`` and
            ``kernel * C <= 32``. Other memory formats than channels_last are copied first.
        grad: of the result, ``[B, O, (H + 2 padding - kernel) // stride + 1, ...]`` in the dtype of x; Triton takes O
            of 16, 32 and 64.
        kernel, stride, padding: of both axes.
        config: the tile of the Triton kernels instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton on a GPU in half precision, where it takes the convolution), ``"triton"`` or
            ``"reference"``.

    Returns:
        ``[O, C, kernel, kernel]`` in the dtype of x, channels_last.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit; an unknown backend; a convolution that Triton, asked for by name, does not
            take.
        BackendUnavailable: the named backend cannot run here; the message tells why.
        RuntimeError: x or grad requires a gradient.
    """
    _check(x, grad, kernel, stride, padding)
    check_config(config, ImageWeightGradientConfig, problem)
    refuse_gradients("image_weight_gradient", {"x": x, "grad": grad})
    x, grad = (one.contiguous(memory_format=torch.channels_last) for one in (x, grad))
    if _choose(backend, x, grad, kernel) == "reference":
        return reference.weight_gradient(x, grad, kernel, stride, padding)
    return cast(Tensor, ops.image_weight_gradient_triton(x, grad, kernel, stride, padding, config or ()))


def _choose(backend: str, x: Tensor, grad: Tensor, kernel: int) -> str:
    why = unfit(grad.shape[1], x.shape[1], kernel)
    if backend == "triton" and why:
        raise ValueError(f"backend 'triton': {why}")
    plain = backend == "auto" and (why or x.dtype not in _HALVES)  # float32 products are the library's to make
    return "reference" if plain else _available(backend, x.device, x.dtype)


@assumed_constant
def _available(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose_backend("image_weight_gradient", backend, device, dtype)


def _check(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> None:
    check_tensor("x", x, DTYPES)
    check_tensor("grad", grad, (x.dtype,), x.device)
    for name, value, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, image in (("x", x), ("grad", grad)):
        if image.dim() != 4 or 0 in image.shape[1:]:
            raise ValueError(f"{name} must be [B, C, H, W] and not empty, got {list(image.shape)}")
    size = [(one + 2 * padding - kernel) // stride + 1 for one in x.shape[2:]]
    if [grad.shape[0], *grad.shape[2:]] != [x.shape[0], *size]:
        raise ValueError(f"grad must be [{x.shape[0]}, O, {size[0]}, {size[1]}], got {list(grad.shape)}")
