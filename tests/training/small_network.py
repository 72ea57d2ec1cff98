"""A network without batch norm that trains in milliseconds, its mesh and its batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from fastmetro.data.labels import MeshLabels
from fastmetro.models.backbones.overlap import convolve

VERTICES = 6
MESH = SimpleNamespace(
    name="small",
    part="body",
    levels=(SimpleNamespace(kept=np.arange(VERTICES)), SimpleNamespace(kept=np.array([0, 3]))),
    joint_regressor=sp.csr_matrix(np.eye(2, VERTICES, dtype=np.float32)),
    root_joints=(0,),
    regressors={},
    num_vertices=VERTICES,
)


class SmallNetwork(nn.Module):
    """Two layers; images of 3 x 4 x 4 to a mesh of six vertices."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(48, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 3 * VERTICES + 3)
        self.register_buffer("coarse", torch.tensor([0, 3]), persistent=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(self.dropout(torch.tanh(self.hidden(images.flatten(1))))).float()
        vertices = out[:, 3:].view(-1, VERTICES, 3)
        return {
            "pred_cam": out[:, :3],
            "pred_3d_joints": vertices[:, :2],
            "pred_3d_vertices_fine": vertices,
            "pred_3d_vertices_coarse": vertices[:, self.coarse],
        }


class ConvolutionalNetwork(SmallNetwork):
    """The small network behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(convolve(self.convolution, images).float())


def labelled(indices: torch.Tensor) -> tuple[torch.Tensor, MeshLabels]:
    """Images and labels of samples; every third lacks vertices, every fourth 3D joints, every fifth 2D joints."""
    generator = torch.Generator().manual_seed(7)
    table = torch.randn(97, 48 + 3 * VERTICES, generator=generator).to(indices.device)
    rows = table[indices % 97]
    vertices = rows[:, 48:].view(-1, VERTICES, 3)
    joints = vertices[:, :2]
    joints_2d = torch.cat([joints[..., :2], torch.ones_like(joints[..., :1])], dim=-1)
    camera = torch.tensor([1.0, 0.0, 0.0], device=indices.device).expand(len(indices), 3)
    flags = [indices % divisor > 0 for divisor in (3, 4, 5)]
    return rows[:, :48].view(-1, 3, 4, 4), MeshLabels(vertices, joints, joints_2d, camera, *flags)
