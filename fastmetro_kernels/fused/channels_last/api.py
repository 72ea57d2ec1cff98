"""The public op: checks and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.fused.channels_last import ops
from fastmetro_kernels.fused.inference import DTYPES, check_tensor, choose_backend, refuse_gradients


def to_channels_last(x: Tensor, dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """``x.to(dtype, memory_format=torch.channels_last)`` of images whose planes lie one behind the other.

    PyTorch's copy writes one number at a time where both order and dtype change. For inference: it has no gradients.

    Args:
        x: ``[B, C, H, W]``, float32, float16, bfloat16 or (reference) float64, with C of 1 to 16 for the kernel; other
            orders than the usual one are copied first.
        dtype: of the result, one of those.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, C, H, W]`` of ``dtype`` in channels_last order, always a new tensor.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit; an unknown backend.
        RuntimeError: x requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    check_tensor("x", x, DTYPES)
    if dtype not in DTYPES:
        accepted = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise TypeError(f"dtype must be one of {accepted}, got {dtype}")
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be [B, C, H, W] with C of at least 1, got {list(x.shape)}")
    refuse_gradients("to_channels_last", {"x": x})
    choices = {choose_backend("to_channels_last", backend, x.device, one) for one in (x.dtype, dtype)}
    chosen = "reference" if "reference" in choices else "triton"
    if x.shape[1] > ops.MAX_CHANNELS:
        if backend == "triton":
            raise ValueError(f"x must have at most {ops.MAX_CHANNELS} channels with backend='triton', got {x.shape[1]}")
        chosen = "reference"
    if chosen == "reference":
        return x.to(dtype, memory_format=torch.channels_last, copy=True)
    return ops.to_channels_last_triton(x.contiguous(), dtype).permute(0, 3, 1, 2)
