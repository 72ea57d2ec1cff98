"""MANO from a licensed model file, for ground truth (Romero et al., "Embodied hands", 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmetro.meshes.smpl import SMPLModel


class MANO(SMPLModel):
    """MANO, right hand: 778 vertices, 16 bones.

    As in the published code, poses are axis-angle vectors to which the mean hand pose of the model is added (that is
    `flat_hand_mean=False` without principal components). Rotation matrices are taken as they are.
    """

    name = "mano"
    hands_mean: Tensor

    def set_model(self, model: dict[str, Any]) -> None:
        super().set_model(model)
        mean = torch.cat([torch.zeros(3, dtype=torch.float64), torch.from_numpy(model["hands_mean"])])
        self.register_buffer("hands_mean", mean.float().reshape(-1, 3), persistent=False)

    def rotations(self, pose: Tensor) -> Tensor:
        pose = super().rotations(pose)
        return pose + self.hands_mean if pose.shape[1:] == self.hands_mean.shape else pose
