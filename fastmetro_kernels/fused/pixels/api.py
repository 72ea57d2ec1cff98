"""The public op: checks, the choice of a backend, and the order of the result's axes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.fused.inference import DTYPES, check_config, check_tensor, choose_backend, refuse_gradients
from fastmetro_kernels.fused.pixels import ops, reference
from fastmetro_kernels.fused.pixels.configs import PixelsConfig, problem


def normalize_pixels(
    pixels: Tensor,
    mean: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    config: PixelsConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """A network's input from pixels: ``(pixels - mean) * scale`` of each channel.

    For inference: it has no gradients. Computed in float32 and rounded once; every backend gives the same bits.
    Autocast changes nothing.

    Args:
        pixels: ``[B, H, W, 3]``, uint8 or float32, or (reference) float16, bfloat16 or float64, which become float32
            first; any strides, of which all but contiguous ones cost a copy.
        mean: float32 ``[3]``, on the device of the pixels.
        scale: float32 ``[3]``, likewise.
        dtype: of the result: float16, bfloat16, float32 or (reference) float64.
        config: The tile of the Triton kernel instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, 3, H, W]`` in channels_last order.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot make this dtype; the message tells why.
    """
    check_tensor("pixels", pixels, (torch.uint8, *DTYPES))
    if pixels.dim() != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pixels must be [B, H, W, 3], got {list(pixels.shape)}")
    for name, tensor in (("mean", mean), ("scale", scale)):
        check_tensor(name, tensor, (torch.float32,), pixels.device)
        if tensor.dim() != 1 or tensor.shape[0] != 3:
            raise ValueError(f"{name} must be [3], one number for each channel, got {list(tensor.shape)}")
    if dtype not in DTYPES:
        accepted = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise TypeError(f"dtype must be one of {accepted}, got {dtype!r}")
    check_config(config, PixelsConfig, problem)
    refuse_gradients("normalize_pixels", {"pixels": pixels, "mean": mean, "scale": scale})
    chosen = choose_backend("normalize_pixels", backend, pixels.device, dtype)
    if pixels.dtype not in ops.INPUTS:
        if backend == "triton":
            raise TypeError(f"pixels must be uint8 or float32 with backend='triton', got {pixels.dtype}")
        chosen = "reference"
    # A [B, H, W, 3] tensor in order is a [B, 3, H, W] one in channels_last order: nothing moves.
    if chosen == "reference":
        return reference.normalize(pixels, mean, scale, dtype).permute(0, 3, 1, 2)
    return ops.normalize_pixels_triton(pixels, mean, scale, dtype, config or ()).permute(0, 3, 1, 2)
