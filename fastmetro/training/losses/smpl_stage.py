"""The loss of the SMPL parameter regressor (protocol 3.7): parameters, and the mesh that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmetro.compat import Compat
from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.mesh import Mesh
from fastmetro.meshes.smpl import NUM_BETAS, SMPL
from fastmetro.training.losses.regression import JointRegression
from fastmetro.training.losses.targets import Targets, check_labels, prepare_targets
from fastmetro.training.losses.terms import combine, l1_sum, squared_sum, weak_perspective, weighted_l1_sum
from fastmetro.training.losses.weights import check_numbers


@dataclass(frozen=True)
class SMPLStageWeights:
    """How much each term counts, and this stage beside the loss of the meshes.

    Attributes:
        rotations, betas: mean squared errors of the entries of rotation matrices and of the shape coefficients.
        joints_3d, joints_2d, vertices: L1 of the mesh of the predicted parameters, metres and half crops.
        stage: of all these in the total.
        mesh: of the mesh recovery loss in the total.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    rotations: float = 1.0
    betas: float = 0.1
    joints_3d: float = 1.0
    joints_2d: float = 1.0
    vertices: float = 1.0
    stage: float = 1000.0
    mesh: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)

    @classmethod
    def published_h36m(cls) -> SMPLStageWeights:
        """The released code's for Human3.6M: the network stays as it is, all but the regressor (protocol 3.7)."""
        return cls(mesh=1e-8)


class SMPLStageLoss(nn.Module):
    """Squared errors of SMPL's rotations and betas, and L1 of the joints, their projection and the vertices they make.

    Joints are compared relative to their root and vertices relative to the pelvis, as with ``LossWeights.centred``.
    The camera that projects is not trained by it. Absent labels and means are as in `MeshRecoveryLoss`.

    Args:
        smpl: the body model. Its buffers belong to this module.
        mesh: the mesh "smpl", for its joint regressors.
        weights: how much each term counts.
        compat: "published" takes the means of joints as the released code does and projects joints relative to the
            pelvis of Human3.6M; see `MeshRecoveryLoss`.

    Attributes:
        term_names: the terms, in the order of ``counts``.

    Raises:
        ValueError: a mesh that does not fit, or an unknown ``compat``.
    """

    factors: Tensor
    sizes: Tensor
    term_names = ("smpl_rotations", "smpl_betas", "smpl_joints_3d", "smpl_joints_2d", "smpl_vertices")

    def __init__(
        self, smpl: SMPL, mesh: Mesh, weights: SMPLStageWeights | None = None, compat: Compat | None = None
    ) -> None:
        super().__init__()
        if compat not in (None, "published"):
            raise ValueError(f"compat must be None or 'published', got {compat!r}")
        vertices = smpl.skinning.num_vertices
        if mesh.num_vertices != vertices:
            raise ValueError(f"mesh must have the {vertices} vertices of the body model, {mesh.name!r} does not")
        self.smpl = smpl
        self.weights = weights = weights or SMPLStageWeights()
        self.compat = compat
        self.regression = JointRegression(mesh, centred=True, published=compat == "published")
        self._roots = tuple(mesh.root_joints)
        factors = [weights.rotations, weights.betas, weights.joints_3d, weights.joints_2d, weights.vertices]
        sizes = [[9 * smpl.num_bones, 0, 0], [NUM_BETAS, 0, 0], [0, 3, 0], [0, 0, 2], [3 * vertices, 0, 0]]
        self.register_buffer("factors", torch.tensor(factors), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float32), persistent=False)

    def counts(self, labels: MeshLabels) -> Tensor:
        """The denominators of the terms, float32 [5]; see `MeshRecoveryLoss.forward`."""
        return self._counts(self._targets(labels, torch.float32))

    def total(self, stage_loss: Tensor, mesh_loss: Tensor) -> Tensor:
        """What is minimised: both losses with their weights."""
        return self.weights.stage * stage_loss + self.weights.mesh * mesh_loss

    def forward(
        self, outputs: Mapping[str, Tensor], labels: MeshLabels, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, without ``weights.stage``, and its unweighted terms (detached scalars), in float32.

        Args:
            outputs: ``pred_rotmat`` [B, 24, 3, 3], ``pred_betas`` [B, 10] and ``pred_cam`` [B, 3] of the network.
            labels: with ``pose_rotations`` and ``betas``.
            counts: see `MeshRecoveryLoss.forward`.

        Raises:
            ValueError: an output or a label is missing or has another shape.
        """
        missing = [name for name in ("pred_rotmat", "pred_betas", "pred_cam") if name not in outputs]
        if missing:
            raise ValueError(f"outputs must have pred_rotmat, pred_betas and pred_cam; {', '.join(missing)} missing")
        if labels.pose_rotations is None or labels.betas is None:
            raise ValueError("labels must have pose_rotations and betas, got None")
        check_labels(labels, self.regression.num_vertices, self.regression.num_joints)
        dtype = torch.promote_types(torch.float32, outputs["pred_rotmat"].dtype)
        with torch.autocast(labels.vertices.device.type, enabled=False):
            targets = self._targets(labels, dtype)
            rotations, betas = outputs["pred_rotmat"].to(dtype), outputs["pred_betas"].to(dtype)
            sums = {
                "smpl_rotations": squared_sum(rotations, labels.pose_rotations, labels.has_vertices),
                "smpl_betas": squared_sum(betas, labels.betas, labels.has_vertices),
                **self._mesh_sums(rotations, betas, outputs["pred_cam"].detach().to(dtype), labels, targets),
            }
            return combine(sums, self._counts(targets) if counts is None else counts, self.factors)

    def _mesh_sums(
        self, rotations: Tensor, betas: Tensor, camera: Tensor, labels: MeshLabels, targets: Targets
    ) -> dict[str, Tensor]:
        vertices, _ = self.smpl(rotations, betas)
        joints = self.regression(vertices)
        goal = self.regression.centre(targets.joints_3d)
        projected = weak_perspective(joints.to_project, camera)
        truth, valid = labels.vertices.to(vertices.dtype), labels.has_vertices
        true_origin = torch.where(valid.view(-1, 1, 1), self.regression.origin(truth), 0.0)
        return {
            "smpl_joints_3d": weighted_l1_sum(joints.to_compare, goal, targets.confidence_3d),
            "smpl_joints_2d": weighted_l1_sum(projected, targets.joints_2d, targets.confidence_2d),
            "smpl_vertices": l1_sum(vertices - (joints.origin - true_origin), truth, valid),
        }

    def _targets(self, labels: MeshLabels, dtype: torch.dtype) -> Targets:
        return prepare_targets(labels, dtype, self._roots, self.compat == "published")

    def _counts(self, targets: Targets) -> Tensor:
        return (self.sizes * targets.amounts).sum(dim=1)
