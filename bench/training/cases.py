"""The networks that are trained, and a batch of random tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.hierarchy import mesh_level
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.meshes.simplification import simplify
from fastmetro.models import FastMETRO, create_model
from fastmetro.profiling.contenders import settle_batch_norms

FULL = 6890
"""Vertices of a body whose every vertex is a token, as many as SMPL has."""


@dataclass(frozen=True)
class Case:
    """A network and its batch.

    Attributes:
        name: on the command line.
        model: for ``create_model``.
        batch: images per step.
        full: whether all vertices of a body of ``FULL`` are tokens, so that nothing is upsampled.
    """

    name: str
    model: str
    batch: int
    full: bool = False


CASES = {
    case.name: case
    for case in (
        Case("s-r50", "fastmetro-s", 32),
        Case("l-r50", "fastmetro-l", 32),
        Case("l-r50-full", "fastmetro-l", 16, full=True),
    )
}


def full_mesh(count: int = FULL) -> Mesh:
    """The default body with so many vertices, all of them on one level."""
    body = load_mesh("anny-body")
    assert body.vertices is not None and body.faces is not None and body.joint_regressor is not None
    kept, faces = simplify(body.vertices, body.faces, count)
    level = mesh_level(body.vertices[kept], faces, np.arange(count))
    regressor = body.joint_regressor[:, kept]
    sums = np.asarray(regressor.sum(1)).ravel()
    regressor = regressor.multiply(1 / np.where(sums == 0, 1.0, sums)[:, None]).tocsr()
    return replace(
        body, name=f"anny-body-{count}", levels=(level,), upsampling=(), joint_regressor=regressor, regressors={},
        uv=None, uv_faces=None,
    )  # fmt: skip


def build_model(case: Case, device: torch.device) -> FastMETRO:
    """The network in training mode, with batch norms as they are in training."""
    torch.manual_seed(0)
    mesh = full_mesh() if case.full else load_mesh("anny-body")
    model = create_model(case.model, "resnet50", mesh)
    settle_batch_norms(model.backbone)
    return model.to(device).train()


def random_batch(mesh: Mesh, batch: int, device: torch.device) -> tuple[Tensor, MeshLabels]:
    """Images, channels last, and labels that all count."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    images = normal(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    joints = len(mesh.joint_names)
    there = torch.ones(batch, dtype=torch.bool, device=device)
    return images, MeshLabels(
        vertices=0.3 * normal(batch, mesh.num_vertices, 3),
        joints_3d=0.3 * normal(batch, joints, 3),
        joints_2d=torch.cat([0.5 * normal(batch, joints, 2), torch.ones(batch, joints, 1, device=device)], dim=-1),
        camera=torch.tensor([1.0, 0.0, 0.0], device=device).repeat(batch, 1),
        has_vertices=there,
        has_joints_3d=there,
        has_joints_2d=there,
    )
