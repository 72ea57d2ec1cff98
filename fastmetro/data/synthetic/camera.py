"""Where the camera stands and which square of its picture becomes the crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom


@dataclass(frozen=True)
class View:
    """A perspective camera and a crop.

    A point at root-relative position p in the camera's frame projects to
    ((p + translation)_xy / (p + translation)_z - centre) / half_size, in crop coordinates.

    Attributes:
        translation: [B, 3], the root in the camera's frame, metres.
        centre: [B, 2], the crop's centre in units of focal lengths.
        half_size: [B, 1], half the crop's side in the same units; 1 / half_size is the focal length in half crops.
    """

    translation: Tensor
    centre: Tensor
    half_size: Tensor

    def project(self, points: Tensor) -> Tensor:
        """[B, N, 3] -> [B, N, 3]: crop coordinates (x, y) and depth in metres."""
        moved = points + self.translation.unsqueeze(1)
        flat = moved[..., :2] / moved[..., 2:].clamp_min(1e-3)
        crop = (flat - self.centre.unsqueeze(1)) / self.half_size.unsqueeze(1)
        return torch.cat([crop, moved[..., 2:]], dim=-1)


def _rotation(axis: int, angle: Tensor) -> Tensor:
    """[B] radians -> [B, 3, 3] about a coordinate axis."""
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    rows = {
        0: (one, zero, zero, zero, cos, -sin, zero, sin, cos),
        1: (cos, zero, sin, zero, one, zero, -sin, zero, cos),
        2: (cos, -sin, zero, sin, cos, zero, zero, zero, one),
    }[axis]
    return torch.stack(rows, dim=-1).view(-1, 3, 3)


def sample_orientation(rng: CounterRandom) -> Tensor:
    """[B, 3, 3]: from the body's frame (y up, facing +z) to the camera's (y down, z away).

    Two thirds face the camera within about 45 degrees, the rest any direction. The camera looks slightly up or down,
    rarely steeply; it rolls a little in 4 of 10; one body in twenty is turned arbitrarily.
    """
    yaw = torch.where(
        rng.chance("view/facing", 0.65),
        0.7 * rng.normal("view/yaw"),
        rng.uniform("view/turn", low=-math.pi, high=math.pi),
    )
    steep = rng.chance("view/steep", 0.1)
    pitch = rng.normal("view/pitch") * torch.where(steep, 0.6, 0.2)
    roll = torch.where(rng.chance("view/rolled", 0.4), 0.3 * rng.normal("view/roll"), torch.zeros_like(yaw))
    anyhow = rng.chance("view/anyhow", 0.05)
    pitch = torch.where(
        anyhow, rng.uniform("view/any_pitch", low=-math.pi / 2, high=math.pi / 2), pitch.clamp(-1.2, 1.2)
    )
    roll = torch.where(anyhow, rng.uniform("view/any_roll", low=-math.pi, high=math.pi), roll.clamp(-1.05, 1.05))
    # Half a turn about x leads from y up, z towards the viewer, to y down, z away.
    return _rotation(2, roll) @ _rotation(0, pitch + math.pi) @ _rotation(1, yaw)


def sample_view(rng: CounterRandom, vertices: Tensor, joints: Tensor, upper: Sequence[int]) -> View:
    """Place the camera and the crop around a body [B, V, 3] with joints [B, J, 3] (root-relative, camera's frame).

    Most crops hold the whole body with a random margin and shift, as person boxes do. A fifth show the upper body only
    (the joints ``upper``: a first one at the head, and others to include), and some cut a part off.
    """
    batch = rng.batch_size
    distance = torch.exp(rng.uniform("view/distance", 1, low=math.log(1.6), high=math.log(12.0)))
    nearest = vertices[..., 2].amin(dim=1, keepdim=True)
    distance = torch.maximum(distance, 0.6 - nearest)  # nothing of the body is nearer than 0.6 m
    aside = 0.25 * rng.normal("view/aside", 2).clamp(-2, 2) * distance
    translation = torch.cat([aside, distance], dim=1)

    moved = vertices + translation.unsqueeze(1)
    flat = moved[..., :2] / moved[..., 2:]
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    centre, half = (low + high) / 2, (high - low).amax(dim=1, keepdim=True) / 2
    joint_points = torch.stack([joints[:, j] for j in upper], dim=1) + translation.unsqueeze(1)
    joint_points = joint_points[..., :2] / joint_points[..., 2:]
    upper_low, upper_high = joint_points.amin(dim=1), joint_points.amax(dim=1)
    upper_half = 0.5 * (upper_high - upper_low).amax(dim=1, keepdim=True)
    upper_half = torch.maximum(upper_half * rng.uniform("view/upper", 1, low=1.1, high=1.8), 0.18 * half)

    kind = rng.choice("view/crop", (0.68, 0.2, 0.12)).view(batch, 1)
    part = rng.uniform("view/part", 1, low=0.45, high=0.9)
    part_centre = low + (high - low) * rng.uniform("view/part_centre", 2, low=0.25, high=0.75)
    margin = (1.15 + 0.15 * rng.normal("view/margin", 1)).clamp(0.95, 1.7)
    half_size = torch.where(kind == 1, upper_half, torch.where(kind == 2, part * half, margin * half))
    centre = torch.where(kind == 1, (upper_low + upper_high) / 2, torch.where(kind == 2, part_centre, centre))
    centre = centre + half_size * 0.06 * rng.normal("view/shift", 2).clamp(-3, 3)
    return View(translation, centre, half_size)
