"""Coarse-to-fine mesh upsampling: by constant sparse matrices or by learned linear layers (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastmetro_kernels import SparseMatrix, sparse_upsample


class FixedUpsampling(nn.Module):
    """Multiply vertices by a constant sparse matrix. No parameters, nothing in the state dict.

    Args:
        matrix: M x N, from N coarse to M fine vertices.
        backend: backend of `fastmetro_kernels.sparse_upsample`; "dense" means its plain PyTorch reference.
    """

    def __init__(self, matrix: sp.spmatrix | sp.sparray, backend: str) -> None:
        super().__init__()
        self.matrix = SparseMatrix.from_scipy(matrix)
        self.backend = "reference" if backend == "dense" else backend

    def forward(self, vertices: Tensor) -> Tensor:
        """Map vertices [B, N, 3] to [B, M, 3]."""
        return sparse_upsample(vertices, self.matrix, backend=self.backend)


class LearnedUpsampling(nn.Linear):
    """A linear layer over the vertices: x, y and z are mapped from N to M vertices by the same weights."""

    def forward(self, vertices: Tensor) -> Tensor:
        """Map vertices [B, N, 3] to [B, M, 3]."""
        return torch.matmul(self.weight.to(vertices.dtype), vertices) + self.bias.to(vertices.dtype)[:, None]


def check_steps(steps: Sequence[sp.spmatrix | sp.sparray], num_vertices: int) -> list[sp.csr_array]:
    """The upsampling matrices of a mesh, coarse to fine, with matching shapes.

    Raises:
        ValueError: more than two matrices, or shapes that do not follow one another.
    """
    if len(steps) > 2:
        raise ValueError(f"mesh.upsampling must have at most 2 matrices (coarse, intermediate, fine), got {len(steps)}")
    sizes = [num_vertices]
    for matrix in steps:
        if matrix.shape[1] != sizes[-1]:
            raise ValueError(f"mesh.upsampling: a matrix of shape {matrix.shape} follows {sizes[-1]} vertices")
        sizes.append(matrix.shape[0])
    return [sp.csr_array(matrix, dtype=np.float64) for matrix in steps]
