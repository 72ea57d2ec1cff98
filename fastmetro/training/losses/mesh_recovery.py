"""The losses of the paper (Section 3.4) and of the released code (protocol 3.7), with flags of what labels exist."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmetro.compat import Compat
from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.mesh import Mesh
from fastmetro.training.losses.regression import JointRegression, MeshJoints
from fastmetro.training.losses.surface import SurfaceTerms
from fastmetro.training.losses.targets import (
    JOINTS_2D,
    JOINTS_3D,
    VERTICES,
    Targets,
    check_labels,
    prepare_targets,
)
from fastmetro.training.losses.terms import combine, l1_sum, weak_perspective, weighted_l1_sum
from fastmetro.training.losses.weights import LossWeights

_SURFACE = ("edge_lengths", "edge_self", "normals")


class MeshRecoveryLoss(nn.Module):
    """L1 on the vertices of every level, the joint tokens, the joints of the fine mesh, and both projections.

    Further terms compare edges and normals; see `LossWeights`, also for its presets. Targets are root-relative, and
    by default predictions are compared as they are: so the network itself learns to put the root at the origin, and
    its raw outputs project with its raw camera.

    Every term is a mean over the labels that exist, weighted by their confidence; it is 0, with zero gradients, where
    there is none. What stands in absent labels, NaN included, does not matter.

    Args:
        mesh: the mesh the network was made for (its joint regressor and which vertices each level keeps).
        weights: how much each term counts.
        compat: "published" reproduces what the released code does differently (protocol 3.7 and 3.11):

            - joint errors are multiplied by their confidence, but the means are over all joints of the samples with
              3D joints, and over all 2D joints of the batch;
            - 2D joints count in samples without ``has_joints_2d``, too, if their confidence is positive;
            - 3D joints are taken relative to a root of confidence 0, too;
            - centred joints of a body's mesh project relative to the pelvis of Human3.6M, those of the tokens relative
              to the middle of the hips (by default both relative to the latter);
            - centred vertices of a hand are compared with true ones as they are, relative to the wrist of the hand
              model, which is not that of the joint regressor;
            - an edge has the length sqrt(squares + 1e-8 m^2), ``edge_self`` is the mean length, and in hands an edge
              counts once for each of its faces.

            Its intermediate body has nine triangles more than the mesh hierarchy that it also ships; they are not used
            here.

    Attributes:
        term_names: the terms, in the order of ``counts``.

    Raises:
        ValueError: a mesh that lacks what the weights ask for, no positive weight, or an unknown ``compat``.
    """

    factors: Tensor
    sizes: Tensor

    def __init__(self, mesh: Mesh, weights: LossWeights | None = None, compat: Compat | None = None) -> None:
        super().__init__()
        if compat not in (None, "published"):
            raise ValueError(f"compat must be None or 'published', got {compat!r}")
        self.weights = weights = weights or LossWeights()
        self.compat = compat
        published = compat == "published"
        self.regression = JointRegression(mesh, weights.centred, published)
        self._roots = tuple(mesh.root_joints) if weights.centred else ()
        self._centre_truth = weights.centred and not (published and mesh.part == "hand")
        level_sizes = self._add_levels(mesh)
        factors = weights.factors(level_sizes)
        if not factors:
            raise ValueError(f"weights must have a positive weight, got {weights}")
        self.surface: SurfaceTerms | None = None
        if any(name in factors for name in _SURFACE):
            if weights.surface_level not in level_sizes:
                raise ValueError(
                    f"surface_level must be one of {tuple(level_sizes)} for mesh {mesh.name!r}, "
                    f"got {weights.surface_level!r}"
                )
            level = mesh.levels[list(level_sizes).index(weights.surface_level)]
            per_face = published and mesh.part == "hand"
            self.surface = SurfaceTerms(level, "normals" in factors, published, per_face)
        self.term_names = tuple(factors)
        self._levels = [
            level
            for level in level_sizes
            if f"vertices_{level}" in factors or (self.surface is not None and level == weights.surface_level)
        ]
        self._outputs = self._needed_outputs()
        self.register_buffer("factors", torch.tensor(list(factors.values())), persistent=False)
        self.register_buffer("sizes", self._term_sizes(level_sizes), persistent=False)

    def _add_levels(self, mesh: Mesh) -> dict[str, int]:
        """Vertices of each level by name, fine to coarse; buffers with the places of coarser ones in the fine mesh."""
        accepted = {1: ("fine",), 2: ("fine", "coarse"), 3: ("fine", "intermediate", "coarse")}
        names = accepted.get(len(mesh.levels))
        if names is None:
            raise ValueError(f"mesh {mesh.name!r} must have 1 to 3 levels, has {len(mesh.levels)}")
        kept = torch.arange(len(mesh.levels[0].kept))
        sizes = {"fine": len(kept)}
        for name, level in zip(names[1:], mesh.levels[1:], strict=True):
            kept = kept[torch.as_tensor(level.kept, dtype=torch.int64)]
            self.register_buffer(f"kept_{name}", kept, persistent=False)
            sizes[name] = len(kept)
        return sizes

    def _needed_outputs(self) -> list[str]:
        needed = [f"pred_3d_vertices_{level}" for level in dict.fromkeys(("fine", *self._levels))]
        if any(name.startswith("token") for name in self.term_names):
            needed.append("pred_3d_joints")
        if any(name.endswith("joints_2d") for name in self.term_names):
            needed.append("pred_cam")
        return needed

    def _term_sizes(self, level_sizes: Mapping[str, int]) -> Tensor:
        """[T, 3]: how many numbers each vertex label, 3D joint and 2D joint of a batch adds to each term."""
        sizes = torch.zeros(len(self.term_names), 3)
        for row, name in zip(sizes, self.term_names, strict=True):
            if name.endswith("joints_3d"):
                row[JOINTS_3D] = 3
            elif name.endswith("joints_2d"):
                row[JOINTS_2D] = 2
            elif self.surface is not None and name in self.surface.sizes:
                row[VERTICES] = self.surface.sizes[name]
            else:
                row[VERTICES] = 3 * level_sizes[name.removeprefix("vertices_")]
        return sizes

    def counts(self, labels: MeshLabels) -> Tensor:
        """The denominators of the terms, float32 [T] in the order of ``term_names``; see ``forward``."""
        return self._counts(self._targets(labels, torch.float32))

    def forward(
        self, outputs: Mapping[str, Tensor], labels: MeshLabels, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its unweighted terms (detached scalars), in float32 (float64 for float64 outputs).

        Args:
            outputs: what the network returns.
            labels: labels of the same samples.
            counts: denominators of the terms, [T]; those of these labels by default. Where a batch is spread over W
                processes whose gradients are averaged, pass the sum of their ``counts(labels)`` divided by W: then
                the averages of loss, terms and gradients are those of the whole batch in one process.

        Raises:
            ValueError: an output is missing, or a label or ``counts`` has another shape than the mesh or the terms.
        """
        check_labels(labels, self.regression.num_vertices, self.regression.num_joints)
        missing = [name for name in self._outputs if name not in outputs]
        if missing:
            raise ValueError(f"outputs must have {', '.join(self._outputs)}; {', '.join(missing)} missing")
        dtype = torch.promote_types(torch.float32, outputs["pred_3d_vertices_fine"].dtype)
        with torch.autocast(labels.vertices.device.type, enabled=False):
            targets = self._targets(labels, dtype)
            values = {name: outputs[name].to(dtype) for name in self._outputs}
            mesh_joints = self.regression(values["pred_3d_vertices_fine"])
            sums = self._joint_sums(values, mesh_joints, targets)
            sums |= self._vertex_sums(values, mesh_joints, labels)
            ordered = {name: sums[name] for name in self.term_names}
            return combine(ordered, self._counts(targets) if counts is None else counts, self.factors)

    def _targets(self, labels: MeshLabels, dtype: torch.dtype) -> Targets:
        return prepare_targets(labels, dtype, self._roots, self.compat == "published")

    def _counts(self, targets: Targets) -> Tensor:
        return (self.sizes * targets.amounts).sum(dim=1)

    def _joint_sums(self, values: Mapping[str, Tensor], mesh_joints: MeshJoints, targets: Targets) -> dict[str, Tensor]:
        joints = {"mesh": (mesh_joints.to_compare, mesh_joints.to_project)}
        if "pred_3d_joints" in values:
            tokens = self.regression.centre(values["pred_3d_joints"])
            joints["token"] = (tokens, tokens)
        goal = self.regression.centre(targets.joints_3d)
        sums: dict[str, Tensor] = {}
        for source, (to_compare, to_project) in joints.items():
            if f"{source}_joints_3d" in self.term_names:
                sums[f"{source}_joints_3d"] = weighted_l1_sum(to_compare, goal, targets.confidence_3d)
            if f"{source}_joints_2d" in self.term_names:
                projected = weak_perspective(to_project, values["pred_cam"])
                sums[f"{source}_joints_2d"] = weighted_l1_sum(projected, targets.joints_2d, targets.confidence_2d)
        return sums

    def _vertex_sums(
        self, values: Mapping[str, Tensor], mesh_joints: MeshJoints, labels: MeshLabels
    ) -> dict[str, Tensor]:
        """Sums of the terms of vertices, edges and normals."""
        truth, valid = labels.vertices, labels.has_vertices
        shift = mesh_joints.origin
        if shift is not None and self._centre_truth:
            # One difference of origins serves all levels. A true one that is NaN may not reach the prediction.
            shift = shift - torch.where(valid.view(-1, 1, 1), self.regression.origin(truth), 0.0)
        sums: dict[str, Tensor] = {}
        for level in self._levels:
            prediction = values[f"pred_3d_vertices_{level}"]
            goal = truth if level == "fine" else truth[:, self.get_buffer(f"kept_{level}")]
            if f"vertices_{level}" in self.term_names:
                moved = prediction if shift is None else prediction - shift
                sums[f"vertices_{level}"] = l1_sum(moved, goal, valid)
            if self.surface is not None and level == self.weights.surface_level:
                sums |= self.surface(prediction, goal, valid, self.term_names)
        return sums
