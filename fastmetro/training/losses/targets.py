"""The labels of a batch as the losses need them: absent ones made harmless, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro.data.labels import MeshLabels

VERTICES, JOINTS_3D, JOINTS_2D = range(3)  # places in `Targets.amounts`


class Targets(NamedTuple):
    """Labels of B samples. What is absent is 0 and has confidence 0, whatever stood there.

    Attributes:
        joints_3d, joints_2d: [B, J, 3] and [B, J, 2].
        confidence_3d, confidence_2d: [B, J].
        amounts: [3], the samples with vertices, the 3D joints and the 2D joints that a mean is taken over.
    """

    joints_3d: Tensor
    joints_2d: Tensor
    confidence_3d: Tensor
    confidence_2d: Tensor
    amounts: Tensor


def prepare_targets(
    labels: MeshLabels, dtype: torch.dtype, roots: Sequence[int] = (), published: bool = False
) -> Targets:
    """Joints, confidences and denominators of a batch, in ``dtype``.

    By default a mean is over the joints that have a label, weighted by their confidence, and where 3D joints are
    compared relative to ``roots`` a sample counts only if these have a label.

    ``published``: means are over all joints of the samples with 3D joints, whatever their confidence, and over all 2D
    joints of the batch, whether a sample has 2D joints (``has_joints_2d``) or not; a root of confidence 0 serves as
    root (protocol 3.7, 3.11.12).
    """
    has_3d = labels.has_joints_3d.unsqueeze(1)
    is_2d = labels.joints_2d[..., 2] > 0
    if not published:
        is_2d = is_2d & labels.has_joints_2d.unsqueeze(1)
    if labels.joints_3d.shape[-1] == 3:
        is_3d, confidence_3d = has_3d, has_3d.to(dtype).expand(labels.joints_3d.shape[:2])
    else:
        is_3d = has_3d & (labels.joints_3d[..., 3] > 0)
        if not published:
            for root in roots:
                is_3d = is_3d & is_3d[:, root : root + 1]
        confidence_3d = torch.where(is_3d, labels.joints_3d[..., 3], 0.0).to(dtype)
    image = torch.where(is_2d.unsqueeze(-1), labels.joints_2d, 0.0).to(dtype)
    joints_3d = torch.where((has_3d if published else is_3d).unsqueeze(-1), labels.joints_3d[..., :3], 0.0).to(dtype)
    if published:
        amount_3d = labels.has_joints_3d.sum() * confidence_3d.shape[1]
        amount_2d = image.new_full((), confidence_3d.numel())
    else:
        amount_3d, amount_2d = confidence_3d.sum(), image[..., 2].sum()
    amounts = torch.stack([labels.has_vertices.sum().to(dtype), amount_3d.to(dtype), amount_2d])
    return Targets(joints_3d, image[..., :2], confidence_3d, image[..., 2], amounts)


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
