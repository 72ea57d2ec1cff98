"""Normals and light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom


def face_incidence(faces: np.ndarray, num_vertices: int) -> Tensor:
    """int64 [V, K]: the faces around each vertex, padded with F (one past the last face).

    With it, sums over a vertex's faces are gathers: the same on every run, unlike atomic scatters.
    """
    order = np.argsort(faces.ravel(), kind="stable")
    counts = np.bincount(faces.ravel(), minlength=num_vertices)
    table = np.full((num_vertices, int(counts.max())), len(faces), dtype=np.int64)
    slots = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[faces.ravel()[order], slots] = order // 3
    return torch.from_numpy(table)


def vertex_normals(vertices: Tensor, faces: Tensor, incidence: Tensor) -> Tensor:
    """Area-weighted unit normals: [B, V, 3], [F, 3], [V, K] -> [B, V, 3]."""
    corners = [vertices[:, faces[:, corner]] for corner in range(3)]
    normals = torch.linalg.cross(corners[1] - corners[0], corners[2] - corners[0])
    normals = F.pad(normals, (0, 0, 0, 1))
    total = torch.zeros_like(vertices)
    for slot in range(incidence.shape[1]):
        total = total + normals[:, incidence[:, slot]]
    return F.normalize(total, dim=-1, eps=1e-12)


@dataclass(frozen=True)
class Lights:
    """Light on one person per sample.

    Attributes:
        directions: [B, L, 3] unit vectors towards the lights, in the camera's frame.
        colours: [B, L, 3] their colours and strengths.
        sky, ground: [B, 1, 3] light from above and from below.
        gloss: [B, 1] strength of the highlights.
    """

    directions: Tensor
    colours: Tensor
    sky: Tensor
    ground: Tensor
    gloss: Tensor


def sample_lights(rng: CounterRandom, count: int = 2) -> Lights:
    """A key and weaker lights, mostly from above and from the viewer's side, slightly coloured."""
    x, y, z = rng.normal("light/direction", count, 3).unbind(dim=-1)
    towards = torch.stack([x, y - 0.9, z - 0.7], dim=-1)  # the camera's frame: y down, z away from the viewer
    strength = rng.uniform("light/strength", count, 1, low=0.15, high=0.85)
    tint = 1 + 0.08 * rng.normal("light/tint", count, 3)
    ambient = rng.uniform("light/ambient", 1, 1, low=0.25, high=0.65)
    return Lights(
        directions=F.normalize(towards, dim=-1),
        colours=(strength * tint).clamp_min(0),
        sky=ambient * (1 + 0.1 * rng.normal("light/sky", 1, 3)),
        ground=ambient
        * rng.uniform("light/ground", 1, 1, low=0.2, high=0.9)
        * (1 + 0.1 * rng.normal("light/floor", 1, 3)),
        gloss=0.35 * rng.uniform("light/gloss", 1) ** 2,
    )


def shade(colour: Tensor, normals: Tensor, skin: Tensor, openness: Tensor, lights: Lights) -> Tensor:
    """Lambert with wrapped light, a sky-to-ground ambient term and a highlight on skin: [B, N, 3] -> [B, N, 3].

    ``normals`` [B, N, 3] point out of the body in the camera's frame; ``openness`` [B, N] darkens crevices.
    """
    upward = 0.5 - 0.5 * normals[..., 1:2]
    light = (lights.ground + upward * (lights.sky - lights.ground)) * openness.unsqueeze(-1)
    shine = torch.zeros_like(light)
    for number in range(lights.directions.shape[1]):
        towards, tint = lights.directions[:, number : number + 1], lights.colours[:, number : number + 1]
        facing = (normals * towards).sum(dim=-1, keepdim=True)
        light = light + ((facing + 0.15) / 1.15).clamp_min(0) * tint * (0.5 + 0.5 * openness.unsqueeze(-1))
        viewer = torch.cat([towards[..., :2], towards[..., 2:] - 1], dim=-1)
        halfway = F.normalize(viewer, dim=-1)
        shine = shine + (normals * halfway).sum(dim=-1, keepdim=True).clamp_min(0) ** 24 * tint
    gloss = (lights.gloss * (0.3 + 0.7 * skin)).unsqueeze(-1)
    return (colour * light + gloss * shine).clamp(0, 1)


def crevices(depth: Tensor, covered: Tensor, radius: int = 6) -> Tensor:
    """How open each pixel is, 0.35..1: pixels that lie behind their neighbours on the body are darker.

    depth [B, H, W] in metres (anything where not ``covered`` [B, H, W]); a cheap stand-in for ambient occlusion.
    """
    mask = covered.float().unsqueeze(1)
    filled = torch.where(covered, depth, torch.zeros_like(depth)).unsqueeze(1)
    side = 2 * radius + 1
    near, count = (F.avg_pool2d(plane, side, stride=1, padding=radius) for plane in (filled, mask))
    mean = near / count.clamp_min(1e-6)
    behind = (filled - mean).squeeze(1) / 0.12
    return 1 - 0.65 * behind.clamp(0, 1)
