"""The joints of a fine mesh, as they are or relative to a root."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastmetro.meshes.mesh import Mesh


class MeshJoints(NamedTuple):
    """Joints of B meshes.

    Attributes:
        to_compare: [B, J, 3], for comparison with true 3D joints.
        to_project: [B, J, 3], for comparison with true 2D joints.
        origin: [B, 1, 3], what vertices are relative to; None if they are compared as they are.
    """

    to_compare: Tensor
    to_project: Tensor
    origin: Tensor | None


class JointRegression(nn.Module):
    """Linear regression of a mesh's joints, by one matrix product.

    Args:
        mesh: its joint regressor, its root joints and, if there, its regressor "h36m", whose first joint is the pelvis.
        centred: take joints relative to their root: the mean of the root joints.
        published: project joints relative to the pelvis of "h36m" instead, as the released code does (protocol 3.7).

    Raises:
        ValueError: the mesh has no joint regressor.
    """

    matrix: Tensor
    origin_row: Tensor | None
    root_weights: Tensor | None

    def __init__(self, mesh: Mesh, centred: bool, published: bool = False) -> None:
        super().__init__()
        if mesh.joint_regressor is None:
            raise ValueError(f"mesh {mesh.name!r} has no joint regressor")
        joints = mesh.joint_regressor.toarray().astype(np.float64)
        self.num_joints, self.num_vertices = joints.shape
        self.separate = centred and published and "h36m" in mesh.regressors
        matrix, origin, weights = joints, None, None
        if centred:
            weights = np.zeros((self.num_joints, 1))
            weights[list(mesh.root_joints)] = 1 / len(mesh.root_joints)
            root = weights.T @ joints
            origin = mesh.regressors["h36m"].toarray()[:1] if "h36m" in mesh.regressors else root
            projected = [joints - origin] if self.separate else []
            matrix = np.concatenate([joints - root, *projected, origin])
        self.register_buffer("matrix", torch.from_numpy(matrix).float(), persistent=False)
        for name, array in (("origin_row", origin), ("root_weights", weights)):
            self.register_buffer(name, None if array is None else torch.from_numpy(array).float(), persistent=False)

    def forward(self, vertices: Tensor) -> MeshJoints:
        """Joints of fine meshes [B, M, 3]."""
        joints = self.matrix.to(vertices.dtype) @ vertices
        if self.origin_row is None:
            return MeshJoints(joints, joints, None)
        compare, rest = joints.split([self.num_joints, joints.shape[1] - self.num_joints], dim=1)
        if self.separate:
            project, origin = rest.split([self.num_joints, 1], dim=1)
            return MeshJoints(compare, project, origin)
        return MeshJoints(compare, compare, rest)

    def origin(self, vertices: Tensor) -> Tensor:
        """What the vertices of fine meshes [B, M, 3] are relative to, [B, 1, 3]; centred regressions only."""
        assert self.origin_row is not None
        return self.origin_row.to(vertices.dtype) @ vertices

    def centre(self, joints: Tensor) -> Tensor:
        """Joints [B, J, 3] relative to their root; as they are where the regression is not centred."""
        if self.root_weights is None:
            return joints
        return joints - (self.root_weights.to(joints.dtype) * joints).sum(dim=1, keepdim=True)
