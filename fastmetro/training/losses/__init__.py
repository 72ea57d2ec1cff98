"""What a network is trained on: meshes, joints and projections, and the SMPL parameters of its optional head."""

from fastmetro.training.losses.mesh_recovery import MeshRecoveryLoss
from fastmetro.training.losses.smpl_stage import SMPLStageLoss, SMPLStageWeights
from fastmetro.training.losses.terms import masked_l1, weak_perspective
from fastmetro.training.losses.weights import LossWeights

__all__ = ["LossWeights", "MeshRecoveryLoss", "SMPLStageLoss", "SMPLStageWeights", "masked_l1", "weak_perspective"]
