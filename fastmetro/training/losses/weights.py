"""How much each term of the mesh recovery loss counts, and presets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Level = Literal["fine", "intermediate", "coarse"]


def check_numbers(weights: Any) -> None:
    """Raise a ValueError that names the first float of a dataclass that is not finite or below 0."""
    for name, value in vars(weights).items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts. Joints and vertices are in metres, 2D joints in half crops ([-1, 1]).

    A term whose weight is 0 is not computed.

    Attributes:
        token_joints_3d, mesh_joints_3d: L1 of the joint tokens, and of the joints regressed from the fine mesh.
        vertices: L1 of the vertices, split among the levels by ``fine_share``, ``intermediate_share`` and
            ``coarse_share``; the share of a level that the mesh lacks is not used.
        token_joints_2d, mesh_joints_2d: L1 of both sets of joints, projected by the predicted camera.
        edge_lengths: L1 of the lengths of predicted and true edges.
        edge_self: mean absolute deviation of the lengths of a mesh's predicted edges from their mean.
        normals: mean |cos| of the angles between the predicted edges of a face and the true normal of the face.
        surface_level: the level whose edges and normals are compared.
        centred: compare 3D joints relative to their root (the middle of the hips, the wrist) and vertices relative to
            the joint "pelvis" that is regressed from the fine mesh (of Human3.6M, where the mesh has that regressor;
            else the root), on the side of the prediction and of the truth; and project joints relative to their root.
            If False, predictions are compared as they are.
    """

    token_joints_3d: float = 1.0
    mesh_joints_3d: float = 1.0
    vertices: float = 1.0
    token_joints_2d: float = 0.25
    mesh_joints_2d: float = 0.25
    fine_share: float = 0.5
    intermediate_share: float = 0.25
    coarse_share: float = 0.25
    edge_lengths: float = 0.0
    edge_self: float = 0.0
    normals: float = 0.0
    surface_level: Level = "intermediate"
    centred: bool = False

    def __post_init__(self) -> None:
        if self.surface_level not in get_args(Level):
            raise ValueError(f"surface_level must be one of {get_args(Level)}, got {self.surface_level!r}")
        check_numbers(self)

    @classmethod
    def paper(cls) -> LossWeights:
        """Equations 1 to 6 of the paper: fine vertices, joints of both kinds and their projections.

        The paper leaves its coefficients to the supplement; these are those of the released code (protocol 3.7), and
        means are over coordinates as there, not over points.
        """
        return cls(1000.0, 1000.0, 100.0, 100.0, 100.0, fine_share=1.0, intermediate_share=0.0, coarse_share=0.0)

    @classmethod
    def published_body(cls) -> LossWeights:
        """The released code's defaults for bodies (protocol 3.7): its group weights multiplied out."""
        return cls(
            1000.0, 1000.0, 100.0, 100.0, 100.0, fine_share=0.25, intermediate_share=0.5, coarse_share=0.25,
            edge_lengths=100 * 5.0, edge_self=100 * 1e-4, normals=100 * 0.1, surface_level="intermediate", centred=True,
        )  # fmt: skip

    @classmethod
    def published_hand(cls) -> LossWeights:
        """The released code's defaults for hands (protocol 3.7): its group weights multiplied out."""
        return cls(
            1000.0, 1000.0, 100.0, 100.0, 100.0, fine_share=0.5, intermediate_share=0.0, coarse_share=0.5,
            edge_lengths=100 * 1.0, normals=100 * 0.1, surface_level="fine", centred=True,
        )  # fmt: skip

    def factors(self, levels: Iterable[str]) -> dict[str, float]:
        """What each term is multiplied by, for a mesh with these levels; terms that count for nothing are left out."""
        factors = {
            "token_joints_3d": self.token_joints_3d,
            "token_joints_2d": self.token_joints_2d,
            "mesh_joints_3d": self.mesh_joints_3d,
            "mesh_joints_2d": self.mesh_joints_2d,
            **{f"vertices_{level}": self.vertices * getattr(self, f"{level}_share") for level in levels},
            "edge_lengths": self.edge_lengths,
            "edge_self": self.edge_self,
            "normals": self.normals,
        }
        return {name: factor for name, factor in factors.items() if factor}
