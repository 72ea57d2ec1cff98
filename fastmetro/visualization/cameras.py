"""Cameras that map vertices to pixels. Frame of the vertices: x right, y down, z away from the camera."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray

Y_UP_TO_CAMERA = (1.0, -1.0, -1.0)
"""Factors from y up, z towards the viewer (mesh templates, files) to the frame of the cameras, and back."""


class Camera(Protocol):
    """What ``render_mesh`` needs of a camera."""

    @property
    def perspective(self) -> bool:
        """Whether x and y are divided by depth."""

    def project(self, vertices: Tensor) -> Tensor:
        """[B, V, 3] -> [B, V, 3]: x, y in pixels (pixel centres at +0.5) and depth."""

    def directions(self, points: Tensor, item: Tensor) -> Tensor:
        """Unit vectors [N, 3] to the viewer from points [N, 3] of the items [N] of the batch."""


def as_vertices(vertices: Array) -> Tensor:
    """float32 [B, V, 3] from a tensor or array [V, 3] or [B, V, 3].

    Raises:
        ValueError: the shape is another, or there is no vertex.
    """
    tensor = torch.as_tensor(vertices).detach().to(torch.float32)
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() != 3 or tensor.shape[2] != 3:
        raise ValueError(f"vertices must be [V, 3] or [B, V, 3], got {tuple(torch.as_tensor(vertices).shape)}")
    if tensor.shape[1] == 0:
        raise ValueError("vertices must hold at least one vertex")
    return tensor


def turn(vertices: Array, degrees: float, tilt: float = 0.0) -> Tensor:
    """Turn meshes about the vertical axis through the middle of their bounding box, then tilt them to the viewer.

    Args:
        vertices: [V, 3] or [B, V, 3], y down.
        degrees: Angle; 90 shows the side that was on the right of the picture.
        tilt: Degrees by which the viewer looks down on the mesh.

    Returns:
        float32 [B, V, 3], on the device of ``vertices``.
    """
    tensor = as_vertices(vertices)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    about_y = tensor.new_tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    about_x = tensor.new_tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    middle = (tensor.amin(1, keepdim=True) + tensor.amax(1, keepdim=True)) / 2
    return (tensor - middle) @ (about_x @ about_y).T + middle


@dataclass(frozen=True)
class OrthographicCamera:
    """Weak perspective: pixel = scale * (x, y) + offset.

    Attributes:
        scale: Pixels per metre, a float or [B].
        offset: Pixel of the origin, (x, y) or [B, 2].
    """

    scale: float | Array
    offset: tuple[float, float] | Array

    perspective = False

    @classmethod
    def from_weak_perspective(
        cls, camera: Array | tuple[float, float, float], left: float = 0.0, top: float = 0.0, side: float = 224.0
    ) -> OrthographicCamera:
        """From the network's camera (s, tx, ty), for which s * ((x, y) + (tx, ty)) is in [-1, 1] over the crop.

        Args:
            camera: [3] or [B, 3] (FastMETRO, Section 3.4; y of the crop points down).
            left: Column of the crop's left edge in the picture that is rendered.
            top: Row of its top edge.
            side: Its side in pixels.
        """
        values = torch.as_tensor(camera, dtype=torch.float32)
        if values.shape[-1] != 3 or values.dim() > 2:
            raise ValueError(f"camera must be [3] or [B, 3], got {tuple(values.shape)}")
        scale = values[..., 0] * (side / 2)
        corner = torch.tensor([left, top], dtype=torch.float32, device=values.device)
        return cls(scale, values[..., 1:] * scale[..., None] + side / 2 + corner)

    @classmethod
    def fit(cls, vertices: Array, size: tuple[int, int], margin: float = 0.06) -> OrthographicCamera:
        """The camera that shows all of ``vertices`` (every item of the batch at one scale) in the middle.

        Args:
            vertices: [V, 3] or [B, V, 3].
            size: Height and width of the picture.
            margin: Free part of the picture on each side.
        """
        tensor = as_vertices(vertices)
        low, high = tensor[..., :2].amin(1), tensor[..., :2].amax(1)
        extent = (high - low).amax(0).clamp(min=1e-9)
        room = tensor.new_tensor([size[1], size[0]]) * (1 - 2 * margin)
        scale = (room / extent).min()
        centre = tensor.new_tensor([size[1] / 2, size[0] / 2])
        return cls(scale.expand(len(tensor)), centre - (low + high) / 2 * scale)

    def item(self, index: int) -> OrthographicCamera:
        """The camera of one item of the batch."""
        scale, offset = torch.as_tensor(self.scale).reshape(-1), torch.as_tensor(self.offset).reshape(-1, 2)
        return OrthographicCamera(scale[index], offset[index])

    def project(self, vertices: Tensor) -> Tensor:
        """Pixels and depth; depth is z moved so that the nearest vertex has 1."""
        scale = torch.as_tensor(self.scale, dtype=torch.float32, device=vertices.device)
        offset = torch.as_tensor(self.offset, dtype=torch.float32, device=vertices.device)
        xy = vertices[..., :2] * scale.reshape(-1, 1, 1) + offset.reshape(-1, 1, 2)
        z = vertices[..., 2:]
        return torch.cat([xy, z - z.amin(1, keepdim=True) + 1.0], 2)

    def directions(self, points: Tensor, item: Tensor) -> Tensor:
        """Unit vectors to the viewer: the same everywhere."""
        return points.new_tensor([0.0, 0.0, -1.0]).expand(points.shape)


@dataclass(frozen=True)
class PerspectiveCamera:
    """Pinhole: pixel = focal * (x, y) / z + centre, for vertices moved by ``translation``; z <= 0 is not drawn.

    Attributes:
        focal: Focal length in pixels.
        centre: Principal point (x, y) in pixels.
        translation: Added to the vertices first, (x, y, z) or [B, 3].
    """

    focal: float
    centre: tuple[float, float]
    translation: tuple[float, float, float] | Array = (0.0, 0.0, 0.0)

    perspective = True

    @classmethod
    def fit(
        cls, vertices: Array, size: tuple[int, int], field_of_view: float = 25.0, margin: float = 0.06
    ) -> PerspectiveCamera:
        """The camera that shows all of ``vertices`` (every item of the batch from one distance) in the middle.

        Args:
            vertices: [V, 3] or [B, V, 3].
            size: Height and width of the picture.
            field_of_view: Vertical angle of the picture in degrees.
            margin: Free part of the picture on each side.
        """
        tensor = as_vertices(vertices)
        low, high = tensor.amin(1), tensor.amax(1)
        middle = (low + high) / 2
        half = ((high - low) / 2).amax(0).clamp(min=1e-9)
        focal = size[0] / 2 / math.tan(math.radians(field_of_view) / 2)
        room = tensor.new_tensor([size[1], size[0]]) / 2 * (1 - 2 * margin)
        distance = float((half[:2] * focal / room).max() + half[2])
        away = tensor.new_tensor([0.0, 0.0, distance])
        return cls(focal, (size[1] / 2, size[0] / 2), away - middle)

    def project(self, vertices: Tensor) -> Tensor:
        """Pixels and depth z."""
        translation = torch.as_tensor(self.translation, dtype=torch.float32, device=vertices.device)
        moved = vertices + translation.reshape(-1, 1, 3)
        z = moved[..., 2:]
        centre = moved.new_tensor(self.centre)
        return torch.cat([moved[..., :2] / z * self.focal + centre, z], 2)

    def directions(self, points: Tensor, item: Tensor) -> Tensor:
        """Unit vectors to the viewer."""
        translation = torch.as_tensor(self.translation, dtype=torch.float32, device=points.device).reshape(-1, 3)
        eyes = -translation[item if len(translation) > 1 else torch.zeros_like(item)]
        return torch.nn.functional.normalize(eyes - points, dim=1)
