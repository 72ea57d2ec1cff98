"""The labels of a batch, as the published data files define them, in one frame.

Frame: the camera's. x points right, y down, z away from the viewer, in metres; the origin is the root of the
body (the middle of the hips) or of the hand (the wrist). 2D joints and weak-perspective cameras live in the crop,
whose corners are (-1, -1) (top left) and (1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MeshLabels:
    """Labels of B samples.

    Attributes:
        vertices: float32 [B, M, 3], root-relative fine mesh, metres.
        joints_3d: float32 [B, J, 3], root-relative joints, metres (J14 of the body, 21 of the hand); or [B, J, 4] with
            the confidence of each joint.
        joints_2d: float32 [B, J, 3], crop coordinates and confidence (0 where the joint lies outside of the crop).
        camera: float32 [B, 3], the weak-perspective camera (s, tx, ty) that fits the 2D joints best:
            s * (xy + t).
        has_vertices: bool [B]; published as ``has_smpl``.
        has_joints_3d: bool [B].
        has_joints_2d: bool [B].
        pose_rotations: float32 [B, 24, 3, 3], rotations of the bones of SMPL, or None; they and ``betas`` count where
            ``has_vertices`` holds.
        betas: float32 [B, 10], shape of SMPL, or None.
    """

    vertices: Tensor
    joints_3d: Tensor
    joints_2d: Tensor
    camera: Tensor
    has_vertices: Tensor
    has_joints_3d: Tensor
    has_joints_2d: Tensor
    pose_rotations: Tensor | None = None
    betas: Tensor | None = None

    def to(self, device: torch.device | str) -> MeshLabels:
        """The same labels on another device."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def clone(self) -> MeshLabels:
        """The same labels in memory of their own."""
        return self.map(torch.clone)

    def map(self, function: Callable[[Tensor], Tensor]) -> MeshLabels:
        """The labels with every tensor that is there changed."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in given.items() if value is not None})


def fit_weak_perspective(points: Tensor, image_points: Tensor, weights: Tensor | None = None) -> Tensor:
    """Least-squares (s, tx, ty) with s * (xy + t) = image_points: [B, N, 3], [B, N, 2] -> [B, 3].

    ``weights`` [B, N], at least 0, say how much each point counts, all alike by default; where a sample has none that
    counts, the result is finite and means nothing. The scale is clamped to 1e-3 from below, so that a degenerate fit
    stays finite.
    """
    flat = points[..., :2]
    if weights is None:
        share = None
        mean, image_mean = flat.mean(dim=1), image_points.mean(dim=1)
    else:
        share = (weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-8)).unsqueeze(-1)
        mean, image_mean = (flat * share).sum(dim=1), (image_points * share).sum(dim=1)
    centred, image_centred = flat - mean.unsqueeze(1), image_points - image_mean.unsqueeze(1)
    products, squares = centred * image_centred, centred.square()
    if share is not None:
        products, squares = products * share, squares * share
    scale = products.sum(dim=(1, 2)) / squares.sum(dim=(1, 2)).clamp_min(1e-8)
    scale = scale.clamp_min(1e-3).unsqueeze(1)
    return torch.cat([scale, image_mean / scale - mean], dim=1)
