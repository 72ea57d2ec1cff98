"""What the predictor returns: one mesh in the camera's frame, and the files it can be saved as."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmetro.files import replacing
from fastmetro.inference.images import CropWindow
from fastmetro.visualization.cameras import Y_UP_TO_CAMERA

MESH_SUFFIXES = (".glb", ".obj", ".ply", ".stl")


@dataclass(frozen=True)
class Prediction:
    """One recovered mesh.

    Attributes:
        vertices: float32 [M, 3] in metres; x right, y down, z away from the camera.
        joints: float32 [K, 3], from the joint tokens, same frame.
        camera: float32 [3], weak perspective (s, tx, ty) of the crop: the crop coordinates of a point, in [-1, 1] with
            y down, are ``s * ((x, y) + (tx, ty))``.
        window: Where the crop lies in the original image.
        image_size: (height, width) of the original image in pixels.
        faces: int64 [F, 3].
        joint_names: K names.
    """

    vertices: np.ndarray
    joints: np.ndarray
    camera: np.ndarray
    window: CropWindow
    image_size: tuple[int, int]
    faces: np.ndarray
    joint_names: tuple[str, ...]

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixels in the original image, [..., 2], of points [..., 3] in the prediction's frame (paper, Section 3.4)."""
        crop = self.camera[0] * (points[..., :2] + self.camera[1:])
        return self.window.to_image(crop)

    def image_camera(self) -> np.ndarray:
        """The weak-perspective camera of the whole image: (pixels per metre, x offset, y offset in pixels).

        A point's pixel is ``scale * (x, y) + offset``.
        """
        scale = self.camera[0] * self.window.side / 2.0
        offset = self.project(np.zeros(3))
        return np.array([scale, *offset], dtype=np.float32)

    def save(self, path: str | Path) -> Path:
        """Write the mesh (.glb, .obj, .ply, .stl: y up, so that it stands upright in viewers) or everything (.npz).

        The file appears whole or not at all. The .npz holds ``vertices``, ``joints``, ``camera``, ``image_camera``,
        ``crop_window`` (left, top, side), ``image_size``, ``faces`` and ``joint_names``, in the prediction's frame.

        Raises:
            ValueError: the suffix is none of these.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".npz":
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **self._arrays())
            return path
        if suffix not in MESH_SUFFIXES:
            raise ValueError(f"cannot save as {suffix!r}; accepted: {', '.join((*MESH_SUFFIXES, '.npz'))}")
        import trimesh

        mesh = trimesh.Trimesh(self.vertices * np.array(Y_UP_TO_CAMERA, dtype=np.float32), self.faces, process=False)
        mesh.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(
                baseColorFactor=[189, 199, 214, 255], metallicFactor=0.0, roughnessFactor=0.7
            )
        )
        if suffix in {".glb", ".obj"}:
            # Without normals in the file, viewers shade every triangle flat.
            data = mesh.export(file_type=suffix[1:], include_normals=True)
        else:
            data = mesh.export(file_type=suffix[1:])
        with replacing(path) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else bytes(data))
        return path

    def _arrays(self) -> dict[str, Any]:
        return {
            "vertices": self.vertices,
            "joints": self.joints,
            "camera": self.camera,
            "image_camera": self.image_camera(),
            "crop_window": np.array([self.window.left, self.window.top, self.window.side], dtype=np.float32),
            "image_size": np.array(self.image_size),
            "faces": self.faces,
            "joint_names": np.array(self.joint_names),
        }
