"""Labels of a network's mesh from those of TSV files: vertices by the body model, joints in the network's order."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmetro.compat import Compat
from fastmetro.data.labels import MeshLabels, fit_weak_perspective
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.rows import GENDERS
from fastmetro.meshes.body import axis_angle_to_matrix
from fastmetro.meshes.mano import MANO
from fastmetro.meshes.mesh import Mesh
from fastmetro.meshes.published import MANO_TO_HAND
from fastmetro.meshes.smpl import SMPL, SMPLModel

J24_TO_J14 = (*range(13), 18)
"""Of the 24 joints of the published labels, the 14 of the networks (protocol 3.4)."""
PUBLISHED_LABEL_TIPS = (745, 317, 444, 556, 673)
"""Vertices at which the released code's MANO layer labels fingertips; its regressor has 445 for the middle finger's."""


class GroundTruth(nn.Module):
    """From a batch of TSV files to labels of a network.

    Vertices are those of the body model of pose and betas: of the neutral one or, where they are given, of that of the
    sample's gender; an unknown gender gets the neutral one, and a RuntimeWarning names it once. Joints and vertices are
    moved so that the root (the middle of the hips, the wrist) is the origin, joints by the labelled root and vertices
    by that regressed from them.

    Args:
        mesh: of the network. Of a mesh that is neither SMPL's nor MANO's a batch gives joints only, and
            ``has_vertices`` never holds.
        model: SMPL or MANO, as the mesh asks; None with ``joints_only``.
        gendered: further models of SMPL by gender, "male" and "female" (3DPW was made with them).
        joints_only: give joints only, of SMPL's mesh too.
        compat: "published" gives the released training loops' labels: joints of a hand are those of MANO's skeleton and
            vertices at the fingertips, relative to its wrist like the vertices, and count where there are parameters,
            whatever 3D joints the rows have; joints of a body count as labelled, whatever the confidence of the root.

    Raises:
        ValueError: the model is missing or is not the mesh's.
    """

    regressor: Tensor
    chosen: Tensor
    roots: Tensor
    tips: Tensor
    order: Tensor

    def __init__(
        self,
        mesh: Mesh,
        model: SMPLModel | None = None,
        gendered: Mapping[str, SMPLModel] | None = None,
        joints_only: bool = False,
        compat: Compat | None = None,
    ) -> None:
        super().__init__()
        if gendered and (mesh.name != "smpl" or not set(gendered) <= {"male", "female"}):
            raise ValueError(f"gendered must be 'male' and 'female' models for the mesh 'smpl', got {list(gendered)}")
        if mesh.name in ("smpl", "mano") and not joints_only and (model is None or model.name != mesh.name):
            raise ValueError(f"mesh {mesh.name!r} needs its body model for vertices, got {type(model).__name__}")
        if mesh.joint_regressor is None:
            raise ValueError(f"mesh {mesh.name!r} has no joint regressor")
        self.mesh_name, self.num_vertices = mesh.name, mesh.num_vertices
        self.model = model if model is not None and model.name == mesh.name else None
        self.gendered = nn.ModuleDict(dict(gendered or {}))
        self._published = compat == "published"
        self._named: set[str] = set()  # unknown genders that were warned of
        regressor = torch.from_numpy(mesh.joint_regressor.toarray()).float()
        self.register_buffer("regressor", regressor, persistent=False)
        chosen = J24_TO_J14 if mesh.part == "body" else range(21)
        # Indices are tensors on the device: a list would be copied there in every step.
        self.register_buffer("chosen", torch.tensor(list(chosen)), persistent=False)
        self.register_buffer("roots", torch.tensor(mesh.root_joints), persistent=False)
        self.register_buffer("tips", torch.tensor(PUBLISHED_LABEL_TIPS), persistent=False)
        self.register_buffer("order", torch.tensor(MANO_TO_HAND), persistent=False)

    @torch.no_grad()
    def forward(self, batch: TsvBatch) -> MeshLabels:
        """The labels of a batch on this module's device.

        Where a root has no confidence, the joints of that sample have none either (but see ``compat``).
        """
        joints_2d, joints_3d = batch.joints_2d[:, self.chosen], batch.joints_3d[:, self.chosen]
        points, confidence = joints_3d[..., :3], joints_3d[..., 3:]
        points = points - points[:, self.roots].mean(dim=1, keepdim=True)
        has_joints_3d = batch.has_joints_3d
        if not self._published:
            known = (confidence[:, self.roots] > 0).all(dim=1, keepdim=True)
            confidence = torch.where(known, confidence, 0.0)
        rotations: Tensor | None = None
        if self._published and isinstance(self.model, MANO):
            vertices, points = self._published_hands(self.model, batch)
            confidence, has_joints_3d = torch.ones_like(points[..., :1]), batch.has_smpl
        else:
            vertices, rotations = self._vertices(batch)
        has_vertices = batch.has_smpl if self.model is not None else torch.zeros_like(batch.has_smpl)
        return MeshLabels(
            vertices=vertices,
            joints_3d=torch.cat([points, confidence], dim=-1),
            joints_2d=joints_2d,
            camera=fit_weak_perspective(points, joints_2d[..., :2], joints_2d[..., 2].clamp(0, 1)),
            has_vertices=has_vertices,
            has_joints_3d=has_joints_3d,
            has_joints_2d=batch.has_joints_2d,
            pose_rotations=rotations,
            betas=None if rotations is None else batch.betas,
        )

    def model_of(self, gender: str) -> str:
        """Whose model makes the vertices of a sample of that gender: "male", "female" or "neutral"."""
        return gender if gender in self.gendered else "neutral"

    def _vertices(self, batch: TsvBatch) -> tuple[Tensor, Tensor | None]:
        """Root-relative vertices [B, M, 3] and, of SMPL, rotations [B, 24, 3, 3]."""
        if self.model is None:
            return batch.images.new_zeros((len(batch.images), self.num_vertices, 3)), None
        vertices, _ = self.model(batch.pose, batch.betas)
        if self.gendered:
            self._name_unknown(batch.genders)
        for gender, model in self.gendered.items():
            rows = [row for row, found in enumerate(batch.genders) if found == gender]
            if rows:
                vertices[rows] = model(batch.pose[rows], batch.betas[rows])[0]
        root = (self.regressor @ vertices)[:, self.roots].mean(dim=1, keepdim=True)
        body = self.mesh_name == "smpl"
        return vertices - root, axis_angle_to_matrix(batch.pose.unflatten(1, (-1, 3))) if body else None

    def _published_hands(self, model: MANO, batch: TsvBatch) -> tuple[Tensor, Tensor]:
        """Vertices [B, 778, 3] and joints [B, 21, 3] relative to the wrist of MANO's skeleton."""
        vertices, bones = model(batch.pose, batch.betas)
        joints = torch.cat([bones, vertices[:, self.tips]], dim=1)[:, self.order]
        wrist = bones[:, :1]
        return vertices - wrist, joints - wrist

    def _name_unknown(self, genders: Iterable[str]) -> None:
        accepted = set(GENDERS.values())
        unknown = sorted(set(genders) - accepted - self._named)
        if unknown:
            self._named.update(unknown)
            found = ", ".join(repr(gender[:60]) for gender in unknown[:5])
            known = ", ".join(map(repr, sorted(accepted)))
            warnings.warn(
                f"gender of labels must be one of {known}, got {found}; their vertices are the neutral model's",
                RuntimeWarning,
                stacklevel=2,
            )


def ground_truth(
    mesh: Mesh,
    model_file: Path | None,
    male: Path | None = None,
    female: Path | None = None,
    *,
    compat: Compat | None = None,
) -> GroundTruth:
    """For a mesh, with the user's model file where the mesh is SMPL's or MANO's.

    Args:
        mesh: of the network.
        model_file: SMPL (neutral) or MANO.
        male, female: of SMPL, for samples of that gender; the neutral one without.
        compat: see :class:`GroundTruth`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the mesh needs a file and none is given, or it is not of that model.
    """
    if mesh.name not in ("smpl", "mano"):
        return GroundTruth(mesh, compat=compat)
    if model_file is None:
        raise ValueError(
            f"labels of vertices are made by the {mesh.name.upper()} model, whose file is yours to bring: name it by "
            "data.body_model (training) or --body-model (evaluation)"
        )
    gendered = {gender: SMPL(path) for gender, path in (("male", male), ("female", female)) if path is not None}
    model = SMPL(model_file) if mesh.name == "smpl" else MANO(model_file)
    return GroundTruth(mesh, model, gendered, compat=compat)
