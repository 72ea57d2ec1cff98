"""What a training minimises: the loss of the meshes and, in its stage, that of the SMPL parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmetro.data.labels import MeshLabels
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.losses.smpl_stage import SMPLStageLoss


class Objective(nn.Module):
    """The weighted sum of one or two losses.

    Args:
        meshes: the loss of cameras, joints and vertices.
        stage: the loss of the SMPL parameter regressor, if it is trained.

    Attributes:
        term_names: of both losses.
    """

    def __init__(self, meshes: MeshRecoveryLoss, stage: SMPLStageLoss | None = None) -> None:
        super().__init__()
        self.meshes, self.stage = meshes, stage
        self.term_names = meshes.term_names + (() if stage is None else stage.term_names)

    def counts(self, labels: MeshLabels) -> Tensor:
        """The denominators of all terms, float32 [T]; see :meth:`MeshRecoveryLoss.forward`."""
        counts = self.meshes.counts(labels)
        return counts if self.stage is None else torch.cat([counts, self.stage.counts(labels)])

    def forward(
        self, outputs: Mapping[str, Tensor], labels: MeshLabels, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and its unweighted terms (detached scalars); arguments and errors as of the losses."""
        if self.stage is None:
            return self.meshes(outputs, labels, counts)
        split = len(self.meshes.term_names)
        mesh_loss, terms = self.meshes(outputs, labels, None if counts is None else counts[:split])
        stage_loss, more = self.stage(outputs, labels, None if counts is None else counts[split:])
        return self.stage.total(stage_loss, mesh_loss), terms | more
