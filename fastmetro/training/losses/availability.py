"""Which labels of a batch count, and how many they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro.data.labels import MeshLabels

VERTICES, JOINTS_3D, JOINTS_2D = range(3)  # places in `Availability.amounts`


class Availability(NamedTuple):
    """What labels of B samples count.

    Attributes:
        vertices: bool [B].
        joints_3d: confidences [B, J], 0 where there is no label.
        readable_3d: bool [B, J] or [B, 1], where the coordinates of 3D joints are read.
        joints_2d: the same for 2D joints.
        amounts: [3], the samples with vertices, the 3D joints and the 2D joints that a mean is taken over.
    """

    vertices: Tensor
    joints_3d: Tensor
    readable_3d: Tensor
    joints_2d: Tensor
    amounts: Tensor


def availability(
    labels: MeshLabels, dtype: torch.dtype, roots: Sequence[int] = (), published: bool = False
) -> Availability:
    """Confidences and denominators of a batch.

    By default a mean is over the joints that have a label, weighted by their confidence, and where 3D joints are
    compared relative to ``roots`` a sample counts only if these have a label.

    ``published``: means are over all joints of the samples with 3D joints, whatever their confidence, and over all 2D
    joints of the batch, whether a sample has 2D joints (``has_joints_2d``) or not; a root of confidence 0 serves as
    root (protocol 3.7, 3.11.12).
    """
    has_3d = labels.has_joints_3d.unsqueeze(1)
    joints_2d = _where_positive(labels.joints_2d[..., 2].to(dtype))
    if not published:
        joints_2d = torch.where(labels.has_joints_2d.unsqueeze(1), joints_2d, 0.0)
    if labels.joints_3d.shape[-1] == 4:
        confidence = labels.joints_3d[..., 3].to(dtype)
        joints_3d = torch.where(has_3d, _where_positive(confidence), 0.0)
        if not published:
            for root in roots:
                joints_3d = torch.where(joints_3d[:, root : root + 1] > 0, joints_3d, 0.0)
    else:
        joints_3d = has_3d.to(dtype).expand(labels.joints_3d.shape[:2])
    if published:
        amount_3d = labels.has_joints_3d.sum() * joints_3d.shape[1]
        amount_2d = joints_2d.new_full((), joints_2d.numel())
        readable = has_3d
    else:
        amount_3d, amount_2d, readable = joints_3d.sum(), joints_2d.sum(), joints_3d > 0
    amounts = torch.stack([labels.has_vertices.sum().to(dtype), amount_3d.to(dtype), amount_2d])
    return Availability(labels.has_vertices, joints_3d, readable, joints_2d, amounts)


def check_labels(labels: MeshLabels, num_vertices: int, num_joints: int) -> None:
    """Raise a ValueError that names the label whose shape does not fit."""
    batch = len(labels.vertices)
    expected: dict[str, list[tuple[int, ...]]] = {
        "vertices": [(batch, num_vertices, 3)],
        "joints_3d": [(batch, num_joints, 3), (batch, num_joints, 4)],
        "joints_2d": [(batch, num_joints, 3)],
        "has_vertices": [(batch,)],
        "has_joints_3d": [(batch,)],
        "has_joints_2d": [(batch,)],
    }
    for name, shapes in expected.items():
        found = tuple(getattr(labels, name).shape)
        if found not in shapes:
            accepted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"labels.{name} must be {accepted}, got {list(found)}")


def _where_positive(confidence: Tensor) -> Tensor:
    """Confidences; 0 for NaN and below."""
    return torch.where(confidence > 0, confidence, 0.0)
