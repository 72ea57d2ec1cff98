"""Declaration of the rasteriser's op: its schema and what it returns under tracing."""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "fastmetro_kernels"

torch.library.define(
    f"{NAMESPACE}::rasterize_native",
    "(Tensor vertices, Tensor faces, int height, int width, bool cull, bool perspective_correct)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::rasterize_native")
def _rasterize_native_fake(
    vertices: Tensor, faces: Tensor, height: int, width: int, cull: bool, perspective_correct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(vertices.dim() == 3 and vertices.shape[2] == 3, lambda: "vertices must be [B, V, 3]")
    torch._check(faces.dim() == 2 and faces.shape[1] == 3, lambda: "faces must be [F, 3]")
    shape = (vertices.shape[0], height, width)
    return (
        vertices.new_empty(shape, dtype=torch.int32),
        vertices.new_empty((*shape, 3), dtype=torch.float32),
        vertices.new_empty(shape, dtype=torch.float32),
    )
