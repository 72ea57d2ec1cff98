"""Random poses as anatomical angles: kinds of activity, their spread, and the range of every joint.

All angles are degrees from the upright position with hanging arms and straight limbs. They are angles of whole joints,
for poses as people take them; `fastmetro.meshes.anatomy` limits single bones from the rest pose, for random ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmetro.data.counter_random import CounterRandom

# Ranges of motion, rounded from textbook values for healthy adults. Abduction of the arm starts above 0, since
# bodies here may be wide and nothing else keeps an arm out of them.
LIMB_RANGES: dict[str, tuple[float, float]] = {
    "hip_flexion": (-20, 115),
    "hip_abduction": (-12, 50),
    "hip_rotation": (-35, 40),
    "knee_flexion": (0, 140),
    "ankle_flexion": (-20, 40),
    "arm_abduction": (8, 170),
    "arm_flexion": (-45, 165),
    "arm_outward": (-40, 55),
    "arm_rotation": (-55, 55),
    "elbow_flexion": (2, 142),
    "forearm_rotation": (-75, 75),
    "wrist_flexion": (-50, 55),
    "clavicle_lift": (-6, 22),
    "finger_curl": (-12, 75),
    **{f"finger{number}_curl": (-20.0, 20.0) for number in range(2, 6)},  # on top of the common curl
}
TRUNK_RANGES: dict[str, tuple[float, float]] = {
    "spine_flexion": (-22, 65),
    "spine_side": (-28, 28),
    "spine_rotation": (-38, 38),
    "neck_flexion": (-40, 40),
    "neck_side": (-28, 28),
    "neck_rotation": (-65, 65),
}
SIDES = (".L", ".R")
ANGLES = (*(name + side for name in LIMB_RANGES for side in SIDES), *TRUNK_RANGES)
"""The columns of a pose: limb angles of the left and right side in turn, then the trunk's."""


@dataclass(frozen=True)
class PoseKind:
    """An activity: mean and spread of the angles that it says something about; both sides alike unless ``right``."""

    weight: float
    together: float
    angles: dict[str, tuple[float, float]]
    right: dict[str, tuple[float, float]]


_QUIET = {
    "hip_flexion": (2, 8), "hip_abduction": (5, 5), "hip_rotation": (5, 9), "knee_flexion": (5, 7),
    "ankle_flexion": (0, 5), "arm_abduction": (16, 9), "arm_flexion": (5, 17), "arm_outward": (0, 12),
    "arm_rotation": (0, 20), "elbow_flexion": (24, 20), "forearm_rotation": (0, 25), "wrist_flexion": (0, 14),
    "clavicle_lift": (2, 4), "finger_curl": (15, 18), "spine_flexion": (3, 7), "spine_side": (0, 5),
    "spine_rotation": (0, 9), "neck_flexion": (4, 12), "neck_side": (0, 7), "neck_rotation": (0, 24),
    **{f"finger{number}_curl": (0, 8) for number in range(2, 6)},
}  # fmt: skip
_ANYHOW = {
    name: ((low + high) / 2, 0.42 * (high - low)) for name, (low, high) in {**LIMB_RANGES, **TRUNK_RANGES}.items()
}

KINDS: dict[str, PoseKind] = {
    "standing": PoseKind(0.2, 0.4, {}, {}),
    "gesturing": PoseKind(
        0.2, 0.2,
        {"arm_abduction": (38, 30), "arm_flexion": (40, 38), "arm_outward": (0, 25), "arm_rotation": (0, 30),
         "elbow_flexion": (70, 38), "forearm_rotation": (0, 45), "finger_curl": (25, 30)},
        {},
    ),
    "walking": PoseKind(
        0.14, 0.0,
        {"hip_flexion": (28, 9), "knee_flexion": (14, 12), "arm_flexion": (-18, 12), "elbow_flexion": (28, 18)},
        {"hip_flexion": (-12, 7), "knee_flexion": (26, 16), "arm_flexion": (24, 13), "ankle_flexion": (14, 9)},
    ),
    "running": PoseKind(
        0.07, 0.0,
        {"hip_flexion": (62, 18), "knee_flexion": (80, 22), "arm_flexion": (-28, 14), "elbow_flexion": (88, 18),
         "spine_flexion": (13, 9)},
        {"hip_flexion": (-10, 10), "knee_flexion": (40, 30), "arm_flexion": (38, 16), "elbow_flexion": (88, 18),
         "ankle_flexion": (20, 12)},
    ),
    "sitting": PoseKind(
        0.13, 0.75,
        {"hip_flexion": (82, 13), "hip_abduction": (10, 9), "hip_rotation": (0, 12), "knee_flexion": (82, 20),
         "arm_flexion": (30, 24), "arm_abduction": (16, 11), "elbow_flexion": (60, 32), "spine_flexion": (13, 15)},
        {},
    ),
    "crouching": PoseKind(
        0.08, 0.8,
        {"hip_flexion": (72, 32), "hip_abduction": (14, 12), "knee_flexion": (82, 36), "spine_flexion": (26, 18),
         "arm_flexion": (48, 34), "elbow_flexion": (45, 32), "neck_flexion": (-8, 15)},
        {},
    ),
    "reaching": PoseKind(
        0.1, 0.5,
        {"arm_abduction": (115, 35), "arm_flexion": (15, 35), "elbow_flexion": (38, 34), "arm_rotation": (0, 28),
         "hip_abduction": (10, 11), "clavicle_lift": (12, 6), "spine_side": (0, 11)},
        {},
    ),
    "lunging": PoseKind(
        0.05, 0.0,
        {"hip_flexion": (72, 18), "knee_flexion": (78, 18), "arm_flexion": (25, 40), "elbow_flexion": (50, 38)},
        {"hip_flexion": (-8, 9), "knee_flexion": (32, 26), "ankle_flexion": (-8, 10), "arm_flexion": (25, 40),
         "elbow_flexion": (50, 38)},
    ),
    "anyhow": PoseKind(0.03, 0.0, _ANYHOW, {}),
}  # fmt: skip


class PoseSampler(nn.Module):
    """Draws the angles of a batch: radians [B, len(ANGLES)], within their ranges."""

    means: Tensor
    spreads: Tensor
    together: Tensor
    low: Tensor
    high: Tensor
    swapped: Tensor

    def __init__(self) -> None:
        super().__init__()
        ranges = {**{name + side: pair for name, pair in LIMB_RANGES.items() for side in SIDES}, **TRUNK_RANGES}
        tables = [[_spread(kind, name) for name in ANGLES] for kind in KINDS.values()]
        sides = {name: name[:-1] + {"L": "R", "R": "L"}[name[-1]] for name in ANGLES if name.endswith(SIDES)}
        columns = {
            "means": [[mean for mean, _ in row] for row in tables],
            "spreads": [[spread for _, spread in row] for row in tables],
            "together": [[kind.together if name in sides else 0.0 for name in ANGLES] for kind in KINDS.values()],
            "low": [ranges[name][0] for name in ANGLES],
            "high": [ranges[name][1] for name in ANGLES],
        }
        for name, values in columns.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        swapped = [ANGLES.index(sides.get(name, name)) for name in ANGLES]
        self.register_buffer("swapped", torch.tensor(swapped), persistent=False)

    def forward(self, rng: CounterRandom) -> Tensor:
        """Angles in the order of ``ANGLES``."""
        kind = rng.choice("pose/kind", [entry.weight for entry in KINDS.values()])
        common = rng.normal("pose/common", len(LIMB_RANGES), 1).expand(-1, -1, len(SIDES)).flatten(1)
        common = nn.functional.pad(common, (0, len(TRUNK_RANGES)))
        together = self.together[kind]
        noise = together * common + (1 - together.square()).sqrt() * rng.normal("pose/own", len(ANGLES))
        degrees = self.means[kind] + self.spreads[kind] * noise
        degrees = torch.where(rng.chance("pose/mirrored", 0.5, 1), degrees[:, self.swapped], degrees)
        return torch.minimum(torch.maximum(degrees, self.low), self.high) * (math.pi / 180)


def _spread(kind: PoseKind, column: str) -> tuple[float, float]:
    """Mean and spread of one column in degrees."""
    name = column.removesuffix(".L").removesuffix(".R")
    left = kind.angles.get(name, _QUIET[name])
    return kind.right.get(name, left) if column.endswith(".R") else left
