"""Differentiable, batched linear blend skinning of a mesh with linear shape and pose bases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BlendSkinning(nn.Module):
    """Rest shape from linear bases, forward kinematics, linear blend skinning.

    The function of SMPL (Loper et al., "SMPL: a skinned multi-person linear model", 2015, equations 2 to 9), which Anny
    shares up to one term: its bones are first turned from the rest pose of a shape to a common reference pose
    (`alignment`).

    Rotations are relative to the parent bone and written in the axes of the world: rotating bone c by R turns c and all
    its descendants about the head of c, whatever the direction of c is. With all rotations identity the mesh is in its
    reference pose with the head of the root bone at the origin (plus `translation`).

    All work is in matrix products over whole batches. The products of rotations along the skeleton are formed in
    log2(depth) steps. Run it in float32 without TF32: TF32 moves vertices by up to a millimetre. Autocast is switched
    off inside.

    Attributes:
        num_vertices, num_bones, num_shapes: M, J, R.
        parents: parent of each bone, -1 for the root, which is bone 0.

    Args:
        template: [M, 3] metres, rest shape of zero coefficients.
        shape_basis: [R, M, 3].
        bones: [J, 3] heads of the bones of the template.
        bone_basis: [R, J, 3] their change with the shape.
        weights: [M, J] skinning weights, rows sum to 1.
        parents: J integers; parents come before their children, the root first with parent -1.
        pose_basis: [9 (J - 1), M, 3] correction per entry of (rotation - identity) of each bone but the root, or None.

    Raises:
        ValueError: shapes that do not fit one another, or parents that are not such a tree.
    """

    template: Tensor
    shape_basis: Tensor
    bones: Tensor
    bone_basis: Tensor
    weights: Tensor
    pose_basis: Tensor | None
    ancestors: Tensor
    parent_indices: Tensor

    def __init__(
        self,
        template: Tensor,
        shape_basis: Tensor,
        bones: Tensor,
        bone_basis: Tensor,
        weights: Tensor,
        parents: Sequence[int],
        pose_basis: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_vertices, self.num_bones, self.num_shapes = len(template), len(bones), len(shape_basis)
        self.parents = tuple(int(parent) for parent in parents)
        m, j, r = self.num_vertices, self.num_bones, self.num_shapes
        _check_shape("template", template, (m, 3))
        _check_shape("shape_basis", shape_basis, (r, m, 3))
        _check_shape("bones", bones, (j, 3))
        _check_shape("bone_basis", bone_basis, (r, j, 3))
        _check_shape("weights", weights, (m, j))
        if pose_basis is not None:
            _check_shape("pose_basis", pose_basis, (9 * (j - 1), m, 3))
            pose_basis = pose_basis.reshape(9 * (j - 1), 3 * m)
        ancestors = ancestor_table(self.parents)
        if len(self.parents) != j:
            raise ValueError(f"parents must name {j} bones, got {len(self.parents)}")
        self.register_buffer("template", template, persistent=False)
        self.register_buffer("shape_basis", shape_basis.reshape(r, 3 * m), persistent=False)
        self.register_buffer("bones", bones, persistent=False)
        self.register_buffer("bone_basis", bone_basis.reshape(r, 3 * j), persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("pose_basis", pose_basis, persistent=False)
        self.register_buffer("ancestors", ancestors, persistent=False)
        self.register_buffer("parent_indices", torch.tensor([0, *self.parents[1:]]), persistent=False)

    def rest(self, shape: Tensor) -> tuple[Tensor, Tensor]:
        """Rest vertices [B, M, 3] and bone heads [B, J, 3] of shape coefficients [B, R]."""
        with torch.autocast(shape.device.type, enabled=False):
            shape = shape.to(self.template.dtype)
            vertices = torch.addmm(self.template.reshape(-1), shape, self.shape_basis)
            bones = torch.addmm(self.bones.reshape(-1), shape, self.bone_basis)
        return vertices.reshape(-1, self.num_vertices, 3), bones.reshape(-1, self.num_bones, 3)

    def forward(
        self, pose: Tensor, shape: Tensor, translation: Tensor | None = None, alignment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Skin a batch.

        Args:
            pose: rotation matrices [B, J, 3, 3] or axis-angle vectors [B, J, 3] in radians.
            shape: coefficients [B, R]. Batches of one are broadcast, in `pose` and `alignment` too.
            translation: [B, 3] metres, where the head of the root bone goes; the origin by default.
            alignment: rotations [B, J, 3, 3] from each bone's rest to its reference orientation; identity by default.

        Returns:
            vertices [B, M, 3] and heads of the bones [B, J, 3], metres.

        Raises:
            ValueError: shapes that do not fit.
        """
        dtype = self.template.dtype
        if pose.shape[1:] == (self.num_bones, 3):
            pose = axis_angle_to_matrix(pose)
        if pose.shape[1:] != (self.num_bones, 3, 3):
            raise ValueError(
                f"pose must be [B, {self.num_bones}, 3, 3] or [B, {self.num_bones}, 3], got {tuple(pose.shape)}"
            )
        if shape.dim() != 2 or shape.shape[1] != self.num_shapes:
            raise ValueError(f"shape must be [B, {self.num_shapes}], got {tuple(shape.shape)}")
        vertices, heads = self.rest(shape)
        with torch.autocast(pose.device.type, enabled=False):
            pose = pose.to(dtype)
            batch = _common_batch(pose, shape, alignment, translation)
            if self.pose_basis is not None:
                change = (pose[:, 1:] - torch.eye(3, dtype=dtype, device=pose.device)).flatten(1)
                vertices = vertices + (change @ self.pose_basis).reshape(-1, self.num_vertices, 3)
            rotations, posed = self.kinematics(pose, heads, alignment)
            if translation is not None:
                posed = posed + translation.to(dtype)[:, None]
            if alignment is not None:
                rotations = rotations @ alignment.to(dtype)
            offsets = posed - (rotations @ heads[..., None]).squeeze(-1)
            rotations, offsets = rotations.expand(batch, -1, -1, -1), offsets.expand(batch, -1, -1)
            transforms = torch.cat([rotations, offsets[..., None]], -1)
            skinned = self.blend(transforms, vertices)
        return skinned, posed.expand(batch, -1, -1)

    def kinematics(self, pose: Tensor, heads: Tensor, alignment: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """World rotations [B, J, 3, 3] relative to the reference pose and posed heads [B, J, 3] of all bones.

        The transform of a bone is the product of the local ones from the root down to it. Each step multiplies every
        bone's product by that of the ancestor where it ends, which doubles its length.
        """
        offsets = heads - heads[:, self.parent_indices]
        if alignment is not None:  # the bones follow their parents to the reference pose; the root's own leave it be
            turned = (alignment.to(heads.dtype)[:, self.parent_indices] @ offsets[..., None]).squeeze(-1)
            first_level = (self.parent_indices == 0)[:, None]
            offsets = torch.where(first_level, offsets, turned)
        batch = max(len(pose), len(offsets))
        pose, offsets = pose.expand(batch, -1, -1, -1), offsets.expand(batch, -1, -1)
        identity = torch.eye(3, dtype=pose.dtype, device=pose.device).expand(batch, 1, 3, 3)
        rotations = torch.cat([pose, identity], 1)  # the last entry stands above the root
        positions = torch.cat([offsets, offsets.new_zeros(batch, 1, 3)], 1)
        for ancestor in self.ancestors:
            above = rotations[:, ancestor]
            positions = positions[:, ancestor] + (above * positions[:, :, None, :]).sum(-1)
            rotations = compose(above, rotations)
        return rotations[:, :-1], positions[:, :-1]

    def blend(self, transforms: Tensor, vertices: Tensor) -> Tensor:
        """Apply each vertex's weighted mean of bone transforms [B, J, 3, 4] to vertices [B or 1, M, 3]."""
        batch = len(transforms)
        mixed = self.weights @ transforms.permute(1, 0, 2, 3).reshape(self.num_bones, -1)
        mixed = mixed.reshape(self.num_vertices, batch, 3, 4)
        points = vertices.transpose(0, 1)[:, :, None, :]
        return ((mixed[..., :3] * points).sum(-1) + mixed[..., 3]).transpose(0, 1).contiguous()


def ancestor_table(parents: Sequence[int]) -> Tensor:
    """For each step k of the doubling, where the product of 2^k bones that ends at a bone starts above: [K, J + 1].

    Index J stands above the root and for itself.

    Raises:
        ValueError: the first bone is not the root, or a parent does not come before its child.
    """
    count = len(parents)
    if count == 0 or parents[0] != -1:
        raise ValueError("parents must start with the root, whose parent is -1")
    depth = [1] * count
    for bone, parent in enumerate(parents[1:], 1):
        if not 0 <= parent < bone:
            raise ValueError(f"bone {bone} has parent {parent}; parents must come before their children")
        depth[bone] = depth[parent] + 1
    jump = torch.tensor([count, *parents[1:], count])
    table = []
    length = 1
    while length < max(depth):
        table.append(jump)
        jump = jump[jump]
        length *= 2
    return torch.stack(table) if table else torch.zeros(0, count + 1, dtype=torch.int64)


def axis_angle_to_matrix(vectors: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of axis-angle vectors [..., 3] in radians (Rodrigues), smooth at zero."""
    squared = (vectors * vectors).sum(-1)[..., None, None]
    small = squared < 1e-6
    safe = torch.where(small, torch.ones_like(squared), squared)
    angle = safe.sqrt()
    sine = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    cosine = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / safe)
    eye = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    outer = vectors[..., :, None] * vectors[..., None, :]
    return eye + sine * cross_matrix(vectors) + cosine * (outer - squared * eye)


def cross_matrix(vectors: Tensor) -> Tensor:
    """The matrices [..., 3, 3] that multiply by vectors [..., 3] in the sense of the cross product."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Products of rotation matrices, in their own precision also under autocast; many small ones at once."""
    return (first[..., :, :, None] * second[..., None, :, :]).sum(-2)


def nearest_rotation(matrices: Tensor, steps: int = 14) -> Tensor:
    """The rotation R that maximises trace(R^T M) for each matrix M, [..., 3, 3], also where det M < 0.

    Davenport's method: the quaternion of R is the dominant eigenvector of a symmetric 4x4 matrix linear in M. Repeated
    squaring of that matrix, shifted to be positive, leaves the outer product of the quaternion with itself, from which
    R is read. Unlike a singular value decomposition it has a well-behaved gradient and needs no host synchronisation.
    It runs in float64 and resolves gaps of the eigenvalues down to about 1e-3 of the largest.
    """
    m = matrices.to(torch.float64)
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    corner = torch.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], -1)
    eye = torch.eye(3, dtype=m.dtype, device=m.device)
    block = m + m.transpose(-1, -2) - trace[..., None, None] * eye
    top = torch.cat([trace[..., None], corner], -1)[..., None, :]
    key = torch.cat([top, torch.cat([corner[..., None], block], -1)], -2)
    shift = 3**0.5 * m.flatten(-2).norm(dim=-1)[..., None, None]  # at least the sum of singular values
    key = key + shift * torch.eye(4, dtype=m.dtype, device=m.device)
    for _ in range(steps):
        key = key / key.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        key = key @ key
    key = key / key.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    w, v = key[..., 0, 0, None, None], key[..., 1:, 1:]
    spread = v.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return ((w - spread) * eye + 2 * v + 2 * cross_matrix(key[..., 0, 1:])).to(matrices.dtype)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")


def _common_batch(*tensors: Tensor | None) -> int:
    sizes = {len(tensor) for tensor in tensors if tensor is not None} - {1}
    if len(sizes) > 1:
        raise ValueError(f"pose, shape, translation and alignment must have one batch size (or 1), got {sorted(sizes)}")
    return sizes.pop() if sizes else 1
