"""Random Anny bodies: phenotypes and poses as skinned vertices."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.synthetic.poses import ANGLES, SIDES, PoseSampler
from fastmetro.data.synthetic.regions import RegionFields, body_regions
from fastmetro.meshes.anny import PHENOTYPES, AnnyBody
from fastmetro.meshes.body import axis_angle_to_matrix
from fastmetro.meshes.mesh import Mesh

_SPINE = ("spine05", "spine04", "spine03", "spine02", "spine01")
_NECK = ("neck01", "neck02", "neck03", "head")
_Vector = tuple[float, float, float]
_X, _Y, _Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
_FACTORS = 4  # most rotations that one bone is composed of


class _Turn(NamedTuple):
    """A rotation about an axis in the model's frame, by a weighted sum of the pose's angles plus a constant."""

    axis: _Vector
    angles: dict[str, float]
    offset: float = 0.0


class BodySampler(nn.Module):
    """Posed bodies [B, M, 3] from random numbers: metres, y up, facing +z before any rotation of the whole body.

    Raises:
        ValueError: if ``mesh`` is not Anny's body.
    """

    axes: Tensor
    shares: Tensor
    offsets: Tensor

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.body = AnnyBody()
        if mesh.part != "body" or mesh.num_vertices != self.body.num_vertices:
            raise ValueError(f"mesh must be anny-body, got {mesh.name!r} with {mesh.num_vertices} vertices")
        self.angles = PoseSampler()
        _, heads = self.body()
        turns = bone_turns(dict(zip(self.body.bone_names, heads[0].double(), strict=True)))
        bones = self.body.num_bones
        axes = torch.zeros(_FACTORS, bones, 3)
        shares, offsets = torch.zeros(_FACTORS, bones, len(ANGLES)), torch.zeros(_FACTORS, bones)
        for bone, name in enumerate(self.body.bone_names):
            for factor, turn in enumerate(turns.get(name, ())):
                axes[factor, bone] = torch.tensor(turn.axis)
                offsets[factor, bone] = turn.offset
                for angle, share in turn.angles.items():
                    shares[factor, bone, ANGLES.index(angle)] = share
        self.register_buffer("axes", axes, persistent=False)
        self.register_buffer("shares", shares.flatten(0, 1).T.contiguous(), persistent=False)
        self.register_buffer("offsets", offsets.flatten(), persistent=False)

    def regions(self) -> RegionFields:
        """Where clothes lie, for the rest pose of the average body."""
        vertices, heads = self.body()
        weights = self.body.skinning.weights
        return body_regions(
            vertices[0].numpy(force=True), self.body.bone_names, heads[0].numpy(force=True), weights.numpy(force=True)
        )

    def forward(self, rng: CounterRandom) -> Tensor:
        """Vertices [B, M, 3]."""
        vertices, _ = self.body(self.pose(self.angles(rng)), sample_phenotypes(rng))
        return vertices

    def pose(self, angles: Tensor) -> Tensor:
        """Angles [B, len(ANGLES)] in radians -> rotations [B, J, 3, 3] of all bones in the model's axes."""
        sums = (angles @ self.shares + self.offsets).view(len(angles), _FACTORS, -1, 1)
        factors = axis_angle_to_matrix(sums * self.axes).unbind(dim=1)
        return functools.reduce(torch.matmul, factors)


def bone_turns(heads: dict[str, Tensor]) -> dict[str, list[_Turn]]:
    """The rotations of each bone, the last one applied first, given the rest pose's joints [3] by name.

    Model axes: x to the left of the body, y up, z to its front. Flexion turns about x, away from the middle about z,
    outwards about y; the right side mirrors the left.
    """
    turns: dict[str, list[_Turn]] = {}
    for bones, part in ((_SPINE, "spine"), (_NECK, "neck")):
        share = 1 / len(bones)
        axes = ((_Y, "rotation"), (_X, "flexion"), (_Z, "side"))
        bend = [_Turn(axis, {f"{part}_{name}": share}) for axis, name in axes]
        turns.update(dict.fromkeys(bones, bend))
    for side in SIDES:
        turns.update({name + side: turn for name, turn in _limb_turns(_limb_axes(heads, side), side).items()})
    return turns


def _limb_turns(axes: _LimbAxes, side: str) -> dict[str, list[_Turn]]:
    out = 1.0 if side == ".L" else -1.0

    def turn(axis: _Vector, name: str, sign: float = 1.0, offset: float = 0.0) -> _Turn:
        return _Turn(axis, {name + side: sign}, offset)

    turns = {
        "upperleg01": [turn(_X, "hip_flexion", -1), turn(_Z, "hip_abduction", out), turn(_Y, "hip_rotation", out)],
        "lowerleg01": [turn(_X, "knee_flexion")],
        "foot": [turn(_X, "ankle_flexion")],
        "clavicle": [turn(_Z, "clavicle_lift", out)],
        "upperarm01": [
            turn(_Y, "arm_outward", out),
            turn(_X, "arm_flexion", -1),
            turn(_Z, "arm_abduction", out, -out * axes.hanging),
            turn(axes.upper, "arm_rotation"),
        ],
        "lowerarm01": [turn(axes.hinge, "elbow_flexion", 1, -axes.bent)],
        "lowerarm02": [turn(axes.lower, "forearm_rotation")],
        "wrist": [turn(axes.across, "wrist_flexion")],
    }
    for finger in range(2, 6):
        curl = _Turn(axes.curls[finger - 1], {f"finger_curl{side}": 1.0, f"finger{finger}_curl{side}": 1.0})
        turns.update({f"finger{finger}-{joint}": [curl] for joint in range(1, 4)})
    thumb = _Turn(axes.curls[0], {f"finger_curl{side}": 0.5})
    return {**turns, "finger1-2": [thumb], "finger1-3": [thumb]}


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
