"""Random Anny bodies: phenotypes and poses as skinned vertices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.synthetic.poses import sample_angles
from fastmetro.data.synthetic.regions import RegionFields, body_regions
from fastmetro.meshes.anny import PHENOTYPES, AnnyBody
from fastmetro.meshes.body import axis_angle_to_matrix
from fastmetro.meshes.mesh import Mesh

_SIDES = (".L", ".R")
_SPINE = ("spine05", "spine04", "spine03", "spine02", "spine01")
_NECK = ("neck01", "neck02", "neck03", "head")
_Vector = tuple[float, float, float]
_X, _Y, _Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


class BodySampler(nn.Module):
    """Posed bodies [B, M, 3] from random numbers: metres, y up, facing +z before any rotation of the whole body.

    Raises:
        ValueError: if ``mesh`` is not Anny's body.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.body = AnnyBody()
        if mesh.part != "body" or mesh.num_vertices != self.body.num_vertices:
            raise ValueError(f"mesh must be anny-body, got {mesh.name!r} with {mesh.num_vertices} vertices")
        _, heads = self.body()
        self._axes = {
            side: _limb_axes(dict(zip(self.body.bone_names, heads[0].double(), strict=True)), side) for side in _SIDES
        }

    def regions(self) -> RegionFields:
        """Where clothes lie, for the rest pose of the average body."""
        vertices, heads = self.body()
        weights = self.body.skinning.weights
        return body_regions(
            vertices[0].numpy(force=True), self.body.bone_names, heads[0].numpy(force=True), weights.numpy(force=True)
        )

    def forward(self, rng: CounterRandom) -> Tensor:
        """Vertices [B, M, 3]."""
        vertices, _ = self.body(self.pose(sample_angles(rng), rng), sample_phenotypes(rng))
        return vertices

    def pose(self, angles: dict[str, Tensor], rng: CounterRandom) -> Tensor:
        """Rotations [B, J, 3, 3] of all bones in the model's axes (x to its left, y up, z to its front)."""
        turns: dict[str, Tensor] = {}
        for share, bones, name in ((1 / 5, _SPINE, "spine"), (1 / 4, _NECK, "neck")):
            bend = _compose(
                (_Y, share * angles[f"{name}_rotation"]), (_X, share * angles[f"{name}_flexion"]),
                (_Z, share * angles[f"{name}_side"]),
            )  # fmt: skip
            turns.update(dict.fromkeys(bones, bend))
        for side, suffix in enumerate(_SIDES):
            turns.update(
                self._limbs({name: value[:, side] for name, value in angles.items() if value.ndim == 2}, suffix, rng)
            )
        identity = torch.eye(3, device=rng.device).expand(rng.batch_size, 3, 3)
        return torch.stack([turns.get(name, identity) for name in self.body.bone_names], dim=1)

    def _limbs(self, angle: dict[str, Tensor], side: str, rng: CounterRandom) -> dict[str, Tensor]:
        """One side. Flexion turns about x, away from the middle about z, outwards about y; the right side mirrors."""
        out, axes = (1.0 if side == ".L" else -1.0), self._axes[side]
        turns = {
            "upperleg01": _compose(
                (_X, -angle["hip_flexion"]), (_Z, out * angle["hip_abduction"]), (_Y, out * angle["hip_rotation"])
            ),
            "lowerleg01": _compose((_X, angle["knee_flexion"])),
            "foot": _compose((_X, angle["ankle_flexion"])),
            "clavicle": _compose((_Z, out * angle["clavicle_lift"])),
            "upperarm01": _compose(
                (_Y, out * angle["arm_outward"]), (_X, -angle["arm_flexion"]),
                (_Z, out * (angle["arm_abduction"] - axes.hanging)), (axes.upper, angle["arm_rotation"]),
            ),
            "lowerarm01": _compose((axes.hinge, angle["elbow_flexion"] - axes.bent)),
            "lowerarm02": _compose((axes.lower, angle["forearm_rotation"])),
            "wrist": _compose((axes.across, angle["wrist_flexion"])),
        }  # fmt: skip
        for finger in range(2, 6):
            scatter = 0.15 * rng.normal(f"pose/finger{finger}{side}")
            curl = _compose((axes.curls[finger - 1], angle["finger_curl"] + scatter))
            turns.update({f"finger{finger}-{joint}": curl for joint in range(1, 4)})
        thumb = _compose((axes.curls[0], 0.5 * angle["finger_curl"]))
        turns.update({"finger1-2": thumb, "finger1-3": thumb})
        return {name + side: turn for name, turn in turns.items()}


@dataclass(frozen=True)
class _LimbAxes:
    """Axes of one arm in the rest pose (unit vectors), and how far the rest pose is from a straight, hanging arm."""

    upper: _Vector
    lower: _Vector
    hinge: _Vector
    across: _Vector
    curls: tuple[_Vector, ...]
    hanging: float
    bent: float


def _limb_axes(heads: dict[str, Tensor], side: str) -> _LimbAxes:
    def direction(start: str, end: str) -> Tensor:
        return F.normalize(heads[end + side] - heads[start + side], dim=0)

    def curl(finger: str) -> _Vector:
        # Fingers of the rest pose are slightly bent: they go on bending about the same axis.
        return _unit(
            torch.linalg.cross(direction(f"{finger}-1", f"{finger}-2"), direction(f"{finger}-2", f"{finger}-3"))
        )

    upper, lower = direction("upperarm01", "lowerarm01"), direction("lowerarm01", "wrist")
    outwards = upper[0] if side == ".L" else -upper[0]
    return _LimbAxes(
        upper=_unit(upper),
        lower=_unit(lower),
        hinge=_unit(torch.linalg.cross(upper, lower)),
        across=_unit(direction("finger2-1", "finger5-1")),
        curls=tuple(curl(f"finger{finger}") for finger in range(1, 6)),
        hanging=math.atan2(float(outwards), -float(upper[1])),
        bent=math.acos(min(float((upper * lower).sum()), 1.0)),
    )


def _unit(vector: Tensor) -> _Vector:
    x, y, z = F.normalize(vector, dim=0).tolist()
    return x, y, z


def _compose(*turns: tuple[_Vector, Tensor]) -> Tensor:
    """Product of rotations about fixed axes, the last one applied first: [B, 3, 3]."""
    result: Tensor | None = None
    for axis, angle in turns:
        matrix = axis_angle_to_matrix(torch.stack([component * angle for component in axis], dim=-1))
        result = matrix if result is None else result @ matrix
    assert result is not None
    return result


def sample_phenotypes(rng: CounterRandom) -> Tensor:
    """Phenotypes [B, 6] in the order of ``PHENOTYPES``: mostly adults around the average, one in eight a child."""
    value = (0.5 + 0.22 * rng.normal("shape", len(PHENOTYPES))).clamp(0.05, 0.95)
    columns = list(value.unbind(dim=1))
    gender = rng.uniform("shape/gender")
    child = rng.chance("shape/child", 0.125)
    age = torch.where(
        child, rng.uniform("shape/child_age", low=0.1, high=0.5), rng.uniform("shape/age", low=0.5, high=1.0)
    )
    columns[PHENOTYPES.index("gender")], columns[PHENOTYPES.index("age")] = gender, age
    return torch.stack(columns, dim=1)
