"""Regressor of SMPL pose and shape parameters from predicted vertices (optional; GraphCMR's head in FastMETRO).

Kolotouros et al., "Convolutional Mesh Regression for Single-Image Human Shape Reconstruction", CVPR 2019, section
3.4. Parameter names are those of released checkpoints (``smpl_parameter_regressor.regressor.*``).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NUM_ROTATIONS = 24
NUM_BETAS = 10
_HIDDEN = 1024


class _Block(nn.Module):
    """Linear layer, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc_block = nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_block(x)


class _ResidualBlock(nn.Module):
    """Two linear layers with batch norm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_block = nn.Sequential(
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.fc_block(x))


class SMPLParameterRegressor(nn.Module):
    """Vertices of the intermediate mesh -> 24 rotations and 10 shape coefficients of SMPL.

    Args:
        num_vertices: vertices of the intermediate mesh (1723 for SMPL).
        compat: how an orthogonal matrix with determinant -1 becomes a rotation; see :func:`nearest_rotation`.
    """

    def __init__(self, num_vertices: int, compat: bool = False) -> None:
        super().__init__()
        self.compat = compat
        self.regressor = nn.Sequential(
            _Block(num_vertices * 3, _HIDDEN),
            _ResidualBlock(_HIDDEN),
            _ResidualBlock(_HIDDEN),
            nn.Linear(_HIDDEN, NUM_ROTATIONS * 9 + NUM_BETAS),
        )

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self.regressor[-1])

    def forward(self, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """Map vertices [B, num_vertices, 3] to rotation matrices [B, 24, 3, 3] and betas [B, 10]."""
        parameters = self.regressor(vertices.flatten(1).to(self.output.weight.dtype))
        matrices, betas = parameters.split([NUM_ROTATIONS * 9, NUM_BETAS], dim=1)
        return nearest_rotation(matrices.unflatten(1, (NUM_ROTATIONS, 3, 3)), self.compat), betas


def nearest_rotation(matrices: Tensor, compat: bool = False) -> Tensor:
    """Project 3 x 3 matrices to rotations by a batched singular value decomposition on their own device.

    With M = U S V^T the result is U diag(1, 1, det(U V^T)) V^T, the rotation nearest to M in the Frobenius norm.
    The published code returns det(U V^T) U V^T instead: also a rotation, the same where det(U V^T) = 1, else far from
    M; ``compat`` reproduces it.

    The gradient is that of the projection itself and, unlike that of an SVD, finite where singular values coincide,
    as they do for the identity. It is taken as zero in directions where the projection is not differentiable.

    Args:
        matrices: [..., 3, 3], float32 or float64; half precision is computed in float32.
        compat: see above.

    Returns:
        Rotations [..., 3, 3], float32 or float64.
    """
    if matrices.dtype in (torch.float16, torch.bfloat16):
        matrices = matrices.float()
    rotations: Tensor = _NearestRotation.apply(matrices, compat)
    return rotations


class _NearestRotation(torch.autograd.Function):
    """R(M) and its gradient.

    R^T M = V P V^T is symmetric with P = diag(p). A change dM turns R by dR = R V W V^T with W skew-symmetric, and
    differentiating the symmetry gives W_ij = (N_ij - N_ji) / (p_i + p_j) for N = V^T R^T dM V.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, compat: bool) -> Tensor:
        u, singular, vh = torch.linalg.svd(matrices)
        sign = torch.linalg.det(u @ vh).sign()[..., None]
        ones = torch.ones_like(singular[..., :2])
        diagonal = torch.ones_like(singular) if compat else torch.cat([ones, sign], dim=-1)
        orthogonal = (u * diagonal[..., None, :]) @ vh
        scale = sign[..., None] if compat else torch.ones_like(sign[..., None])
        ctx.save_for_backward(orthogonal, vh, singular * diagonal, scale)
        return orthogonal * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        orthogonal, vh, p, scale = ctx.saved_tensors
        v = vh.mT
        a = vh @ orthogonal.mT @ (grads[0] * scale) @ v
        sums = p[..., :, None] + p[..., None, :]
        tiny = torch.finfo(p.dtype).eps * p.abs().amax(-1)[..., None, None]
        safe = sums.abs() > tiny
        b = torch.where(safe, (a - a.mT) / torch.where(safe, sums, torch.ones_like(sums)), torch.zeros_like(a))
        return orthogonal @ v @ b @ vh, None
