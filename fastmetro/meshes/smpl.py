"""SMPL from a licensed model file, for ground truth (Loper et al., "SMPL: a skinned multi-person linear model", 2015).

The file is the user's own; it is read as data (see `fastmetro.meshes.unpickle`), without chumpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from fastmetro.meshes.body import BlendSkinning
from fastmetro.meshes.unpickle import read_object_npz, read_pickle

COUNTS = {"smpl": (6890, 24), "mano": (778, 16)}  # vertices, bones
KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
NUM_BETAS = 10


class SMPLModel(nn.Module):
    """What SMPL and MANO share: shape and pose bases, skeleton, skinning. Use `SMPL` or `MANO`.

    Attributes:
        skinning: the `BlendSkinning`; `faces` int64 [F, 3], `joint_regressor` float32 [J, M] (buffers).
        num_bones: J, 24 for SMPL, 16 for MANO.

    Args:
        model_file: .pkl as distributed, or .npz with the same names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: arrays that are missing or do not fit, or anything but arrays in the file.
    """

    name = ""
    faces: Tensor
    joint_regressor: Tensor

    def __init__(self, model_file: str | Path) -> None:
        super().__init__()
        self.set_model(read_model(Path(model_file), self.name))

    def set_model(self, model: dict[str, Any]) -> None:
        regressor = torch.from_numpy(model["J_regressor"])
        template = torch.from_numpy(model["v_template"])
        shapes = torch.from_numpy(model["shapedirs"]).permute(2, 0, 1)
        # The bases are combined in float64 so that the joints are those of the shape to float32 accuracy.
        skinning = BlendSkinning(
            template,
            shapes,
            regressor @ template,
            regressor @ shapes,
            torch.from_numpy(model["weights"]),
            model["parents"],
            torch.from_numpy(model["posedirs"]).permute(2, 0, 1),
        )
        self.skinning = skinning.float()
        self.num_bones = skinning.num_bones
        self.register_buffer("faces", torch.from_numpy(model["f"]), persistent=False)
        self.register_buffer("joint_regressor", regressor.float(), persistent=False)

    def rotations(self, pose: Tensor) -> Tensor:
        """Pose [B, 3 J] or [B, J, 3] axis-angle, or [B, J, 3, 3], in a form that the skinning takes."""
        return pose.unflatten(1, (-1, 3)) if pose.dim() == 2 and pose.shape[1] % 3 == 0 else pose

    def forward(self, pose: Tensor, betas: Tensor, translation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vertices of poses and shapes.

        Args:
            pose: axis-angle [B, 3 J] or [B, J, 3], or rotation matrices [B, J, 3, 3]; the first is the root.
            betas: [B, 10].
            translation: [B, 3] metres, added to everything.

        Returns:
            vertices [B, M, 3] and joints of the skeleton [B, J, 3], metres.

        Raises:
            ValueError: shapes that do not fit.
        """
        _, bones = self.skinning.rest(betas)
        root = bones[:, 0]
        return self.skinning(self.rotations(pose), betas, root if translation is None else root + translation)


class SMPL(SMPLModel):
    """SMPL: 6890 vertices, 24 bones."""

    name = "smpl"


def read_model(path: Path, name: str) -> dict[str, Any]:
    """The arrays of a SMPL or MANO model file, float64, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `SMPLModel`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {name} model at {path}")
    keys = (*KEYS, "hands_mean") if name == "mano" else KEYS
    raw: Any = read_object_npz(path, keys) if path.suffix == ".npz" else read_pickle(path)
    missing = [key for key in keys if not isinstance(raw, dict) or key not in raw]
    if missing:
        raise ValueError(f"{path} is not a {name} model: {', '.join(missing)} missing")
    vertices, bones = COUNTS[name]
    dense = {key: raw[key].toarray() if sp.issparse(raw[key]) else np.asarray(raw[key]) for key in keys}
    dense["shapedirs"] = dense["shapedirs"][..., :NUM_BETAS]
    shapes: dict[str, tuple[int, ...]] = {
        "v_template": (vertices, 3),
        "shapedirs": (vertices, 3, NUM_BETAS),
        "posedirs": (vertices, 3, 9 * (bones - 1)),
        "J_regressor": (bones, vertices),
        "weights": (vertices, bones),
        "hands_mean": (3 * (bones - 1),),
    }
    model: dict[str, Any] = {}
    for key, shape in shapes.items():
        if key not in keys:
            continue
        array = dense[key]
        if array.shape != shape or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(
                f"{path}: {key} must be finite numbers {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
        model[key] = np.ascontiguousarray(array, np.float64)
    model["f"] = _faces(dense["f"], vertices, path)
    model["parents"] = _parents(dense["kintree_table"], bones, path)
    return model


def _faces(array: np.ndarray, vertices: int, path: Path) -> np.ndarray:
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: f must be integers [F, 3], got {array.dtype} {list(array.shape)}")
    faces = array.astype(np.int64)
    if len(faces) == 0 or faces.min() < 0 or faces.max() >= vertices:
        raise ValueError(f"{path}: f must index {vertices} vertices")
    return faces


def _parents(array: np.ndarray, bones: int, path: Path) -> list[int]:
    if array.shape != (2, bones) or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: kintree_table must be integers [2, {bones}], got {array.dtype} {list(array.shape)}")
    number = {int(bone): index for index, bone in enumerate(array[1])}
    return [-1, *(number.get(int(parent), -2) for parent in array[0, 1:])]
