"""Where clothes, hair and facial features lie on a body: numbers per vertex, made from its bones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ARM = ("upperarm", "lowerarm", "wrist", "metacarpal", "finger")
_LEG = ("upperleg", "lowerleg", "foot", "toe")


class RegionFields(NamedTuple):
    """Scalars over points of the body (vertices [1, V] or pixels [B, N]); all may be interpolated linearly.

    Attributes:
        x, y, z: position on the template in metres, the coordinates of all patterns.
        arm: 0 at the shoulder, 1 at the wrist, above on the hand; -0.2 away from the arms.
        leg: 0 at the hip, 1 at the ankle, above on the foot; -0.2 away from the legs.
        torso: 0 at the height of the hips, 1 at the base of the neck.
        neck: share of the bones of neck and head.
        head: share of the head's bone.
        foot: share of the bones of the feet.
        scalp: in the head's frame, how far up and back: about -1 at the chin, 1 at the crown.
        eyes: distance to the nearer eye in metres.
        mouth: distance to the mouth in metres.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    arm: Tensor
    leg: Tensor
    torso: Tensor
    neck: Tensor
    head: Tensor
    foot: Tensor
    scalp: Tensor
    eyes: Tensor
    mouth: Tensor

    def stack(self) -> Tensor:
        """[..., C]: all fields in their order."""
        return torch.stack(tuple(self), dim=-1)

    @classmethod
    def unstack(cls, planes: Tensor) -> RegionFields:
        """From [..., C], as :meth:`stack` made it."""
        return cls(*planes.unbind(dim=-1))

    @classmethod
    def size(cls) -> int:
        """How many fields there are."""
        return len(cls._fields)


def _along(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    axis = end - start
    return (points - start) @ axis / (axis @ axis)


def body_regions(
    vertices: np.ndarray, bone_names: Sequence[str], bone_heads: np.ndarray, weights: np.ndarray
) -> RegionFields:
    """Fields of a MakeHuman-rigged body in its rest pose (y up, facing +z).

    Args:
        vertices: [V, 3] metres.
        bone_names: J names, such as "upperarm01.L".
        bone_heads: [J, 3] joint positions.
        weights: [V, J] skinning weights, rows sum to 1.

    Returns:
        float32 fields of shape [1, V].
    """
    heads = dict(zip(bone_names, bone_heads, strict=True))

    def share(*prefixes: str, side: str = "") -> np.ndarray:
        columns = [name.startswith(prefixes) and name.endswith(side) for name in bone_names]
        return weights[:, columns].sum(axis=1)

    arm = leg = np.full(len(vertices), -0.2)
    for side in (".L", ".R"):
        on_arm, on_leg = share(*_ARM, side=side), share(*_LEG, side=side)
        reach = _along(vertices, heads["upperarm01" + side], heads["wrist" + side])
        drop = _along(vertices, heads["upperleg01" + side], heads["foot" + side])
        arm = np.where(on_arm > 0.1, on_arm * np.maximum(reach, 0) + (on_arm - 1) * 0.2, arm)
        leg = np.where(on_leg > 0.1, on_leg * np.maximum(drop, 0) + (on_leg - 1) * 0.2, leg)
    hips = (heads["upperleg01.L"] + heads["upperleg01.R"]) / 2
    torso = (vertices[:, 1] - hips[1]) / (heads["neck01"][1] - hips[1])
    # The skull: from the eyes back and up; its size from the vertices that follow the head alone.
    eyes = np.stack([heads["eye.L"], heads["eye.R"]])
    head = share("head", "eye")
    skull = vertices[head > 0.9]
    top, middle = skull[:, 1].max(), eyes.mean(axis=0)
    radius = top - middle[1]
    centre = np.array([middle[0], middle[1], (skull[:, 2].min() + skull[:, 2].max()) / 2])
    offset = (vertices - centre) / radius
    scalp = 0.8 * offset[:, 1] - 0.6 * offset[:, 2]
    mouth = np.array([middle[0], middle[1] - 0.62 * radius, skull[:, 2].max()])
    front = middle + np.array([0.0, 0.0, skull[:, 2].max() - middle[2]]) * 0.7
    eye_points = eyes * np.array([1.0, 1.0, 0.0]) + np.array([0.0, 0.0, front[2]])
    eye_distance = np.linalg.norm(vertices[:, None] - eye_points, axis=-1).min(axis=1)
    mouth_offset = (vertices - mouth) * np.array([0.45, 1.0, 0.45])
    columns = (
        *vertices.T, arm, leg, torso, share("neck", "head", "eye"), head, share("foot", "toe"), scalp,
        eye_distance, np.linalg.norm(mouth_offset, axis=1),
    )  # fmt: skip
    return RegionFields(*(torch.from_numpy(np.ascontiguousarray(c, dtype=np.float32))[None] for c in columns))
