"""Labels of a crop: joints and pose turned and flipped as the picture is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from fastmetro.compat import Compat
from fastmetro.data.augmentation.affine import crop_matrix
from fastmetro.data.augmentation.draw import Draw
from fastmetro.data.augmentation.published import transform_points
from fastmetro.data.tsv.rows import BadRow, Kind, Label

J24 = (
    "R_Ankle", "R_Knee", "R_Hip", "L_Hip", "L_Knee", "L_Ankle", "R_Wrist", "R_Elbow", "R_Shoulder", "L_Shoulder",
    "L_Elbow", "L_Wrist", "Neck", "Top_of_Head", "Pelvis", "Thorax", "Spine", "Jaw", "Head", "Nose", "L_Eye", "R_Eye",
    "L_Ear", "R_Ear",
)  # fmt: skip
"""Joints of the label files (protocol, 3.4)."""
SMPL_BONES = (
    "Pelvis", "L_Hip", "R_Hip", "Spine1", "L_Knee", "R_Knee", "Spine2", "L_Ankle", "R_Ankle", "Spine3", "L_Foot",
    "R_Foot", "Neck", "L_Collar", "R_Collar", "Head", "L_Shoulder", "R_Shoulder", "L_Elbow", "R_Elbow", "L_Wrist",
    "R_Wrist", "L_Hand", "R_Hand",
)  # fmt: skip
"""Whose rotations the pose of SMPL holds (Loper et al. 2015)."""
ROOTS: dict[Kind, int] = {"body": J24.index("Pelvis"), "hand": 0}


def mirrored(names: tuple[str, ...]) -> list[int]:
    """For each name the place of its counterpart on the other side, its own where it has none."""
    other = {"L_": "R_", "R_": "L_"}
    return [names.index(other.get(name[:2], name[:2]) + name[2:]) for name in names]


_MIRRORED_JOINTS, _MIRRORED_BONES = mirrored(J24), mirrored(SMPL_BONES)


@dataclass(frozen=True)
class CropLabel:
    """A label in the frame of its crop.

    Attributes:
        joints_2d: float32 [J, 3], in [-1, 1] inside of the crop, and visibility.
        joints_3d: float32 [J, 4], metres, minus the root, and confidence.
        pose: float32 [P], axis-angle.
    """

    joints_2d: np.ndarray
    joints_3d: np.ndarray
    pose: np.ndarray


def augment_label(label: Label, draw: Draw, kind: Kind, size: int = 224, compat: Compat | None = None) -> CropLabel:
    """Joints and pose of a label in its crop. Visibilities and confidences stay, also outside of the crop.

    Args:
        label: as read; its box and 2D joints may be float64.
        draw: of the sample.
        kind: of the label.
        size: side of the crop, pixels.
        compat: "published" truncates 2D joints to whole pixels of the crop and adds 1 (protocol, quirk 2).

    Raises:
        BadRow: a 2D joint lies so far from the box that float32 cannot hold it.
        ValueError: a hand is to be flipped.
    """
    if draw.flip and kind == "hand":
        raise ValueError("flip must be False for hands: a left hand has no MANO parameters of the right one")
    joints_2d = _joints_2d(label, draw, size, compat)
    joints_3d = label.joints_3d.astype(np.float64)
    joints_3d[:, :3] -= joints_3d[ROOTS[kind], :3]
    turn = Rotation.from_euler("z", -draw.rotation, degrees=True)
    joints_3d[:, :3] = turn.apply(joints_3d[:, :3])
    pose = label.pose.astype(np.float64)
    pose[:3] = (turn * Rotation.from_rotvec(pose[:3])).as_rotvec()
    if draw.flip:
        joints_2d, joints_3d = joints_2d[_MIRRORED_JOINTS], joints_3d[_MIRRORED_JOINTS]
        joints_3d[:, 0] *= -1
        # A mirror reverses the sense of rotations, and its own axis once more.
        pose = (pose.reshape(-1, 3)[_MIRRORED_BONES] * [1, -1, -1]).reshape(-1)
    with np.errstate(over="ignore"):
        single = joints_2d.astype(np.float32)
    if not bool(np.isfinite(single).all()):
        raise BadRow("2D joints too far", "their distance from the box, in sides of it, is more than float32 holds")
    return CropLabel(single, joints_3d.astype(np.float32), pose.astype(np.float32))


def _joints_2d(label: Label, draw: Draw, size: int, compat: Compat | None) -> np.ndarray:
    """float64 [J, 3], flipped in place but not in order."""
    joints = label.joints_2d.astype(np.float64)
    if compat:
        joints[:, :2] = 2 * transform_points(joints[:, :2], label.center, label.scale, draw, size) / size - 1
        if draw.flip:
            joints[:, 0] *= -1
        return joints
    matrix = crop_matrix(label.center, label.scale, draw, size)
    joints[:, :2] = 2 * (joints[:, :2] @ matrix[:, :2].T + matrix[:, 2]) / size - 1
    return joints
