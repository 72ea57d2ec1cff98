"""Native backend of the rasteriser: C++ for CPU tensors, CUDA C++ for CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.rasterization import ops  # noqa: F401  (declares the op)


def rasterize_native(
    vertices: Tensor, faces: Tensor, height: int, width: int, cull: bool, perspective_correct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rasterise on the device of ``vertices`` (float32 [B, V, 3]); see ``api.rasterize`` for the meaning."""
    return torch.ops.fastmetro_kernels.rasterize_native(
        vertices.contiguous(), faces.contiguous(), height, width, cull, perspective_correct
    )
