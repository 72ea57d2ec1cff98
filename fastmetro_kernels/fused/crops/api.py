"""The public op: checks, and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.fused.crops import ops, reference
from fastmetro_kernels.fused.crops.ops import CropMap
from fastmetro_kernels.fused.inference import check_tensor, choose_backend, refuse_gradients


def render_crops(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    places: CropMap,
    factor: Tensor,
    mean: Tensor,
    deviation: Tensor,
    *,
    fixed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Square crops of pictures of different sizes, as a network takes them, in one kernel.

    Each pixel of a crop is the weighed sum of 2 x 2 bilinear samples of its picture, black outside; then
    ``(clamp(factor * x, 0, 255) / 255 - mean) / deviation``. Positions are float64, all else is float32. It has no
    gradients. Nothing waits for the device.

    Args:
        pixels: uint8 ``[N]``, N >= 1: the pictures one after the other, row by row, RGB. What a map would read beyond
            a picture, or beyond these N, is black.
        offsets: int64 ``[B]``, where each begins.
        sizes: int64 ``[B, 2]``, height and width.
        places: where the samples lie.
        factor: float32 ``[B, 3]``.
        mean: float32 ``[3]``, of channels from 0 to 1.
        deviation: float32 ``[3]``.
        fixed: Positions are rounded to 1/32 of a pixel, in the integers of OpenCV's ``warpAffine``.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        float32 ``[B, 3, S, S]``, contiguous.

    Raises:
        TypeError: an argument that is no dense tensor, or of the wrong dtype.
        ValueError: shapes or devices that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot run here; the message tells why.
    """
    constants = {"factor": factor, "mean": mean, "deviation": deviation}
    check_tensor("pixels", pixels, (torch.uint8,))
    check_tensor("offsets", offsets, (torch.int64,), pixels.device)
    check_tensor("sizes", sizes, (torch.int64,), pixels.device)
    for name, tensor in zip(CropMap._fields, places, strict=True):
        check_tensor(name, tensor, (torch.float32 if name.endswith("weights") else torch.float64,), pixels.device)
    for name, tensor in constants.items():
        check_tensor(name, tensor, (torch.float32,), pixels.device)
    if found := ops.problem(pixels, offsets, sizes, CropMap(*places), constants):
        raise ValueError(found)
    refuse_gradients("render_crops", {**places._asdict(), **constants})
    if choose_backend("render_crops", backend, pixels.device, torch.float32) == "reference":
        return reference.render(pixels, offsets, sizes, places, (factor, mean, deviation), fixed)
    return ops.render_crops_triton(pixels, offsets, sizes, list(places), factor, mean, deviation, fixed)
