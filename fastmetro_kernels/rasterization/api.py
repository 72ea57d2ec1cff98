"""Batched z-buffer rasterisation of triangle meshes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.rasterization.native import rasterize_native
from fastmetro_kernels.rasterization.reference import rasterize_reference

MAX_IMAGE_SIZE = 16384
"""Largest height and width."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class RasterOutput(NamedTuple):
    """What every pixel sees. None of it carries gradients."""

    face_index: Tensor
    """int32 [B, H, W]: the visible face, -1 where there is none."""
    barycentrics: Tensor
    """float32 [B, H, W, 3]: weights of that face's three vertices at the pixel centre, 0 where there is none."""
    depth: Tensor
    """float32 [B, H, W]: depth at the pixel centre, +inf where there is none."""


def rasterize(
    vertices: Tensor,
    faces: Tensor,
    height: int,
    width: int,
    *,
    cull: bool = False,
    perspective_correct: bool = False,
    backend: str = "auto",
) -> RasterOutput:
    """Find the nearest triangle behind every pixel centre.

    Coverage is exact: vertices are snapped to 1/256 pixel, edges are tested in integers, and a pixel centre on an
    edge belongs to the triangle for which it is a top or left edge (the rule of Direct3D and OpenGL hardware), so
    triangles that share an edge never both cover, nor both miss, a pixel. Equal depths go to the lowest face index.
    Every backend returns the same face indices; results do not depend on the number of threads.

    A triangle is dropped when it has no area after snapping, a depth <= 0, a NaN or infinite coordinate, or a vertex
    more than 2**21 pixels from the origin (there is no clipping at a near plane).

    Args:
        vertices: [B, V, 3] x (right), y (down) in pixels, pixel centres at +0.5, and depth z (positive in front,
            smaller is nearer). float32; float16, bfloat16 and float64 are converted to float32 first.
        faces: [F, 3] int32 or int64, shared by the batch, on the device of ``vertices``.
        height: Rows of the images, 1 to 16384.
        width: Columns of the images, 1 to 16384.
        cull: Drop triangles seen from behind, that is, whose vertices turn clockwise on the screen.
        perspective_correct: x and y come from a perspective division by z: depth is interpolated linearly in 1/z,
            and the barycentrics are those on the triangle in space. Otherwise both are linear on the screen.
        backend: ``"auto"``, ``"native"`` (C++ or CUDA) or ``"reference"`` (plain PyTorch).

    Returns:
        RasterOutput of face_index, barycentrics, depth. Rasterisation is not differentiable; ``interpolate`` is, in
        the attributes.

    Raises:
        TypeError: a tensor has an unsupported dtype, or is no tensor; a size is a float.
        ValueError: a shape or size is wrong, the tensors are on different devices, or a face names a vertex that does
            not exist. Indices are checked on CPU tensors outside ``torch.compile`` only: on CUDA that would wait for
            the device, so there faces with an index out of range are dropped (never read).
        BackendUnavailable: the backend cannot run on this device.
    """
    _check(vertices, faces, height, width)
    run = rasterize_native if _select(backend, vertices.device) == "native" else rasterize_reference
    positions = vertices.detach().to(torch.float32)
    with torch.no_grad():
        return RasterOutput(*run(positions, faces, int(height), int(width), bool(cull), bool(perspective_correct)))


def interpolate(attributes: Tensor, faces: Tensor, raster: RasterOutput) -> Tensor:
    """Interpolate per-vertex attributes over the pixels; differentiable in the attributes.

    Plain PyTorch. On CUDA its gradient is summed by atomic additions, so that it may differ in the last bits from run
    to run; the values do not.

    Args:
        attributes: [B, V, C] or [V, C] (shared by the batch) floating point.
        faces: The [F, 3] faces that were rasterised.
        raster: What ``rasterize`` returned for them.

    Returns:
        [B, H, W, C] in the dtype of ``attributes``; 0 where there is no face.

    Raises:
        TypeError: ``attributes`` is not floating point.
        ValueError: the shapes do not fit together.
    """
    if not attributes.is_floating_point():
        raise TypeError(f"attributes must be floating point, got {attributes.dtype}")
    batch, height, width = raster.face_index.shape
    if attributes.dim() == 2:
        attributes = attributes.expand(batch, *attributes.shape)
    if attributes.dim() != 3 or attributes.shape[0] != batch:
        raise ValueError(f"attributes must be [V, C] or [{batch}, V, C] for this raster, got {tuple(attributes.shape)}")
    channels = attributes.shape[2]
    if faces.shape[0] == 0 or attributes.shape[1] == 0 or batch == 0:
        return attributes.new_zeros((batch, height, width, channels)) + attributes.sum() * 0
    corners = faces.to(torch.int64)[raster.face_index.clamp(min=0).to(torch.int64)].view(batch, -1, 3)
    weights = raster.barycentrics.view(batch, -1, 3).to(attributes.dtype)
    result = attributes.new_zeros((batch, height * width, channels))
    for corner in range(3):
        index = corners[..., corner, None].expand(-1, -1, channels)
        result = result + weights[..., corner, None] * attributes.gather(1, index)
    covered = (raster.face_index >= 0).view(batch, -1, 1)  # a NaN attribute must not leak into the background
    return torch.where(covered, result, 0.0).view(batch, height, width, channels)


@assumed_constant
def _select(requested: str, device: torch.device) -> str:
    reasons = {"native": backends.native_reasons("rasterize_native", device), "reference": []}
    return backends.select("rasterize", requested, reasons, ("native", "reference"))


def _check(vertices: Tensor, faces: Tensor, height: int, width: int) -> None:
    for name, value in (("vertices", vertices), ("faces", faces)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if vertices.dtype not in _FLOATS:
        raise TypeError(f"vertices must be float32, float16, bfloat16 or float64, got {vertices.dtype}")
    if faces.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"faces must be int32 or int64, got {faces.dtype}")
    if vertices.dim() != 3 or vertices.shape[2] != 3:
        raise ValueError(f"vertices must be [B, V, 3], got {tuple(vertices.shape)}")
    if faces.dim() != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces must be [F, 3], got {tuple(faces.shape)}")
    if faces.device != vertices.device:
        raise ValueError(f"vertices are on {vertices.device} but faces on {faces.device}")
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, float):
            raise TypeError(f"{name} must be an int, got float")
        if not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"{name} must be in 1..{MAX_IMAGE_SIZE}, got {size}")
    if faces.device.type == "cpu" and faces.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in faces.aminmax())
        if low < 0 or high >= vertices.shape[1]:
            raise ValueError(f"faces must name vertices 0..{vertices.shape[1] - 1}, found indices from {low} to {high}")
