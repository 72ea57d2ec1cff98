"""The joints of a fine mesh, as they are or relative to a root."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastmetro.meshes.mesh import Mesh
from fastmetro.models.upsampling import FixedUpsampling
from fastmetro_kernels import SparseMatrix, sparse_upsample


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
    """Linear regression of a mesh's joints, by one product with a sparse matrix.

    One entry in two hundred of a body's regressor is not 0, and a dense product for each mesh would read its vertices
    with one block of threads. Products are in full precision whatever is allowed for dense ones.

    Args:
        mesh: its joint regressor, its root joints and, if there, its regressor "h36m", whose first joint is the pelvis.
        centred: take joints relative to their root: the mean of the root joints.
        published: project joints relative to the pelvis of "h36m" instead, as the released code does (protocol 3.7).
            Nothing changes where joints are not centred.

    Attributes:
        num_joints, num_vertices: J and M.
        product: maps vertices [B, M, 3] to all that is regressed, [B, *, 3]. Benchmarks may put a dense one here.

    Raises:
        ValueError: the mesh has no joint regressor.
    """

    root_weights: Tensor

    def __init__(self, mesh: Mesh, centred: bool, published: bool = False) -> None:
        super().__init__()
        if mesh.joint_regressor is None:
            raise ValueError(f"mesh {mesh.name!r} has no joint regressor")
        self.centred = centred
        self.num_joints, self.num_vertices = mesh.joint_regressor.shape
        self.product: nn.Module
        if not centred:
            self.product = FixedUpsampling(mesh.joint_regressor, "auto")
            return
        joints = mesh.joint_regressor.toarray().astype(np.float64)
        weights = np.zeros((self.num_joints, 1))
        weights[list(mesh.root_joints)] = 1 / len(mesh.root_joints)
        root = weights.T @ joints
        origin = mesh.regressors["h36m"].toarray()[:1] if "h36m" in mesh.regressors else root
        blocks = [joints - root, joints - origin, origin] if published else [joints - root, origin]
        self._block_sizes = [len(block) for block in blocks]
        self.product = FixedUpsampling(sp.csr_matrix(np.concatenate(blocks)), "auto")
        self.origin_row = SparseMatrix(sp.csr_matrix(origin, dtype=np.float64))
        self.register_buffer("root_weights", torch.from_numpy(weights).float(), persistent=False)

    def forward(self, vertices: Tensor) -> MeshJoints:
        """Joints of fine meshes [B, M, 3], float32 or float64 like them."""
        regressed: Tensor = self.product(vertices)
        if not self.centred:
            return MeshJoints(regressed, regressed, None)
        blocks = regressed.split(self._block_sizes, dim=1)
        return MeshJoints(blocks[0], blocks[-2], blocks[-1])

    def origin(self, vertices: Tensor) -> Tensor:
        """What the vertices of fine meshes [B, M, 3] are relative to, [B, 1, 3]; centred regressions only."""
        return sparse_upsample(vertices, self.origin_row)

    def centre(self, joints: Tensor) -> Tensor:
        """Joints [B, J, 3] relative to their root; as they are where the regression is not centred."""
        if not self.centred:
            return joints
        return joints - (self.root_weights.to(joints.dtype) * joints).sum(dim=1, keepdim=True)
