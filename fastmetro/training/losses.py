"""The losses of the paper (Section 3.4), with supervision of every mesh level and per-sample availability flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.mesh import Mesh


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts. Joints and vertices are in metres, 2D joints in half crops ([-1, 1])."""

    token_joints_3d: float = 1.0
    mesh_joints_3d: float = 1.0
    vertices: float = 1.0
    token_joints_2d: float = 0.25
    mesh_joints_2d: float = 0.25
    fine_share: float = 0.5
    intermediate_share: float = 0.25
    coarse_share: float = 0.25


def weak_perspective(points: Tensor, camera: Tensor) -> Tensor:
    """Project [B, N, 3] with ``camera`` [B, 3] = (s, tx, ty) into the crop: s * (xy + t), [B, N, 2] in [-1, 1]."""
    return camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])


def masked_l1(prediction: Tensor, target: Tensor, valid: Tensor, confidence: Tensor | None = None) -> Tensor:
    """Mean absolute error over the samples where ``valid`` [B] holds; 0 (with zero gradients) if none does.

    ``confidence`` [B, N] additionally weighs the N points of a sample.
    """
    weight = valid.to(prediction.dtype).view(-1, 1, 1)
    if confidence is not None:
        weight = weight * confidence.to(prediction.dtype).unsqueeze(-1)
    # A label that is absent may hold anything, even NaN: it is replaced before it can touch the gradient.
    error = (prediction - torch.where(weight > 0, target, prediction.detach())).abs() * weight
    return error.sum() / (weight.expand_as(prediction).sum()).clamp_min(1.0)


class MeshRecoveryLoss(nn.Module):
    """L1 on the vertices of every level, the joint tokens, the joints of the fine mesh, and both projections.

    Targets are root-relative, predictions are compared as they are: so the network itself learns to put the root
    at the origin, and its raw outputs project with its raw camera.

    Args:
        mesh: the mesh the network was made for (its joint regressor and which vertices each level keeps).
        weights: how much each term counts.
    """

    joint_regressor: Tensor

    def __init__(self, mesh: Mesh, weights: LossWeights | None = None) -> None:
        super().__init__()
        self.weights = weights or LossWeights()
        if mesh.joint_regressor is None:
            raise ValueError(f"mesh {mesh.name!r} has no joint regressor")
        regressor = torch.from_numpy(mesh.joint_regressor.toarray()).float()
        self.register_buffer("joint_regressor", regressor, persistent=False)
        kept: Tensor | None = None
        self._levels: list[str] = []
        names = ["intermediate", "coarse"] if len(mesh.levels) == 3 else ["coarse"]
        for name, level in zip(names, mesh.levels[1:], strict=True):
            index = torch.as_tensor(level.kept, dtype=torch.int64)
            kept = index if kept is None else kept[index]
            self.register_buffer(f"kept_{name}", kept, persistent=False)
            self._levels.append(name)

    def forward(self, outputs: Mapping[str, Tensor], labels: MeshLabels) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its unweighted terms (detached scalars), always in float32."""
        with torch.autocast(labels.vertices.device.type, enabled=False):
            return self._terms({name: value.float() for name, value in outputs.items()}, labels)

    def _terms(self, outputs: Mapping[str, Tensor], labels: MeshLabels) -> tuple[Tensor, dict[str, Tensor]]:
        weights, camera = self.weights, outputs["pred_cam"]
        fine = outputs["pred_3d_vertices_fine"]
        joints = {"token": outputs["pred_3d_joints"], "mesh": self.joint_regressor @ fine}
        goal_2d, confidence = labels.joints_2d[..., :2], labels.joints_2d[..., 2]
        terms, total = {}, fine.new_zeros(())
        for source, value in joints.items():
            terms[f"{source}_joints_3d"] = masked_l1(value, labels.joints_3d, labels.has_joints_3d)
            terms[f"{source}_joints_2d"] = masked_l1(
                weak_perspective(value, camera), goal_2d, labels.has_joints_2d, confidence
            )
        terms["vertices_fine"] = masked_l1(fine, labels.vertices, labels.has_vertices)
        for level in self._levels:
            goal = labels.vertices[:, self.get_buffer(f"kept_{level}")]
            terms[f"vertices_{level}"] = masked_l1(outputs[f"pred_3d_vertices_{level}"], goal, labels.has_vertices)
        for name, value in terms.items():
            if name.startswith("vertices"):
                factor = weights.vertices * getattr(weights, name.removeprefix("vertices_") + "_share")
            else:
                factor = getattr(weights, name)
            total = total + factor * value
        return total, {name: value.detach() for name, value in terms.items()}
