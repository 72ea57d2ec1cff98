"""Light and material: smooth normals, soft shadows from depth maps of the mesh, and the shading of a surface point.

The frame is the camera's (x right, y down, z away). Colours are linear inside and sRGB at the edges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels import rasterize

SKY_DIRECTIONS = 96
"""Directions from which the sky is tested for being hidden."""
KEY_DIRECTIONS = 24
"""Directions that make up the disc of the key light."""
KEY_RADIUS = 0.22
"""Radius of that disc over its distance: how soft its shadow is."""

_MAP_SIZE = 256
_MAPS_AT_ONCE = 16

# Directions towards the lights, and their linear colours.
_KEY = (-0.70, -0.58, -0.45)
_FILL = (0.80, -0.10, -0.60)
_RIM = (0.55, -0.55, 0.63)
_KEY_COLOR = (1.16, 1.09, 1.00)
_FILL_COLOR = (0.16, 0.18, 0.22)
_RIM_COLOR = (0.55, 0.60, 0.70)
_SKY_COLOR = (0.33, 0.37, 0.43)
_GROUND_COLOR = (0.23, 0.205, 0.19)
_SHININESS = 28.0
_GLOSS = 0.11


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [B, V, 3] of vertices [B, V, 3]: the faces' normals weighted by area, pointing out of the mesh.

    Vertices without a face of non-zero area get a zero normal.
    """
    a, b, c = (vertices[:, faces[:, corner]] for corner in range(3))
    # Their length is twice the area. In the camera's frame (y down, z away) orientation is that of y up, z to us.
    weighted = torch.linalg.cross(b - a, c - a, dim=2)
    index = faces.reshape(1, -1, 1).expand(len(vertices), -1, 3)
    total = torch.zeros_like(vertices).scatter_add_(1, index, weighted.repeat_interleave(3, 1))
    return F.normalize(total, dim=2, eps=1e-20)


def srgb_to_linear(color: Tensor) -> Tensor:
    """IEC 61966-2-1, from display values in [0, 1] to linear light."""
    return torch.where(color <= 0.04045, color / 12.92, ((color.clamp(min=0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(color: Tensor) -> Tensor:
    """IEC 61966-2-1, from linear light to display values; clipped to [0, 1]."""
    color = color.clamp(0.0, 1.0)
    return torch.where(color <= 0.0031308, color * 12.92, 1.055 * color.clamp(min=1e-8) ** (1 / 2.4) - 0.055)


def light_visibility(vertices: Tensor, normals: Tensor, faces: Tensor) -> Tensor:
    """How much of the sky and of the key light each vertex of a mesh sees.

    Args:
        vertices: float32 [B, V, 3].
        normals: Unit normals [B, V, 3].
        faces: int64 [F, 3].

    Returns:
        float32 [B, V, 2] in [0, 1]: of the sky weighted by the cosine to the normal, and of the key light's disc.
    """
    seen = [visibility_at(p, n, p, faces) for p, n in zip(vertices, normals, strict=True)]
    return _smooth(torch.stack(seen) if seen else vertices.new_ones((0, vertices.shape[1], 2)), faces)


def visibility_at(points: Tensor, normals: Tensor, vertices: Tensor, faces: Tensor) -> Tensor:
    """How much of the sky and of the key light points [N, 3] see past one mesh [V, 3]; as ``light_visibility``.

    The mesh is rasterised from many directions, and a point sees a direction when nothing lies in front of it there.
    """
    sky = _fibonacci_sphere(SKY_DIRECTIONS, vertices.device)
    key = _disc(vertices.new_tensor(_KEY), KEY_RADIUS, KEY_DIRECTIONS)
    batches = torch.cat([sky, key]).split(_MAPS_AT_ONCE)
    seen = torch.cat([_seen_from(points, normals, vertices, faces, directions) for directions in batches])
    weight = (sky @ normals.T).clamp(min=0)
    ambient = (weight * seen[: len(sky)]).sum(0) / weight.sum(0).clamp(min=1e-6)
    return torch.stack([ambient, seen[len(sky) :].mean(0)], 1)


def _smooth(values: Tensor, faces: Tensor, rounds: int = 2) -> Tensor:
    """Average values [B, V, C] over the triangles around each vertex; hides the steps between single directions."""
    index = faces.reshape(1, -1, 1).expand(*values.shape[:1], -1, values.shape[2])
    count = torch.zeros_like(values).scatter_add_(1, index, torch.ones_like(values[:, faces.reshape(-1)]))
    for _ in range(rounds):
        mean = values[:, faces].mean(2).repeat_interleave(3, 1)
        around = torch.zeros_like(values).scatter_add_(1, index, mean)
        values = torch.where(count > 0, around / count.clamp(min=1), values)
    return values


def _seen_from(points: Tensor, normals: Tensor, vertices: Tensor, faces: Tensor, directions: Tensor) -> Tensor:
    """[D, N] in [0, 1]: whether nothing of the mesh lies before each point, seen from each direction."""
    middle = (vertices.amin(0) + vertices.amax(0)) / 2
    radius = (vertices - middle).norm(dim=1).max().clamp(min=1e-9)
    texel = 2 * radius / (_MAP_SIZE - 4)
    axes = _frames(directions)  # rows: right, down, away

    def to_map(positions: Tensor) -> Tensor:
        seen = torch.einsum("dij,vj->dvi", axes, positions - middle)
        return torch.cat([seen[..., :2] / texel + _MAP_SIZE / 2, seen[..., 2:] + 2 * radius], 2)

    depth = rasterize(to_map(vertices), faces, _MAP_SIZE, _MAP_SIZE).depth.flatten(1)
    # The point is lifted off the surface that it may lie on, or it would shade itself.
    lifted = to_map(points + normals * (1.6 * texel))
    position = lifted[..., :2] - 0.5
    corner = position.floor()
    fraction = position - corner
    index = corner.long().clamp(0, _MAP_SIZE - 2)
    index = index[..., 1] * _MAP_SIZE + index[..., 0]
    limit = lifted[..., 2] - 0.5 * texel
    # Comparing at the four neighbours, then interpolating, softens the edges of the shadow.
    top, bottom = (
        torch.lerp(
            (limit <= depth.gather(1, index + row)).float(),
            (limit <= depth.gather(1, index + row + 1)).float(),
            fraction[..., 0],
        )
        for row in (0, _MAP_SIZE)
    )
    return torch.lerp(top, bottom, fraction[..., 1])


def _frames(directions: Tensor) -> Tensor:
    """[D, 3, 3]: orthonormal right, down and away of a viewer who looks from each direction at the origin."""
    away = -F.normalize(directions, dim=1)
    helper = torch.zeros_like(away)
    helper.scatter_(1, away.abs().argmin(1, keepdim=True), 1.0)
    right = F.normalize(torch.linalg.cross(helper, away, dim=1), dim=1)
    return torch.stack([right, torch.linalg.cross(away, right, dim=1), away], 1)


def _fibonacci_sphere(count: int, device: torch.device) -> Tensor:
    """Evenly spread unit vectors [count, 3]."""
    index = torch.arange(count, device=device, dtype=torch.float32) + 0.5
    height = 1 - 2 * index / count
    angle = index * (math.pi * (1 + math.sqrt(5)))
    ring = (1 - height**2).sqrt()
    return torch.stack([ring * angle.cos(), height, ring * angle.sin()], 1)


def _disc(direction: Tensor, radius: float, count: int) -> Tensor:
    """Unit vectors [count, 3] spread over a disc around a direction."""
    frame = _frames(direction[None])[0]
    index = torch.arange(count, device=direction.device, dtype=torch.float32) + 0.5
    distance = radius * (index / count).sqrt()
    angle = index * (math.pi * (1 + math.sqrt(5)))
    offset = (distance * angle.cos())[:, None] * frame[0] + (distance * angle.sin())[:, None] * frame[1]
    return F.normalize(F.normalize(direction, dim=0) + offset, dim=1)


def shade(normals: Tensor, views: Tensor, albedo: Tensor, visibility: Tensor) -> Tensor:
    """Colour of surface points under a warm key light, a cool fill, a rim light and a sky above a floor.

    Args:
        normals: [N, 3], on the side that is seen; need not be of unit length.
        views: Unit vectors [N, 3] from the points to the viewer.
        albedo: [N, 3] sRGB.
        visibility: [N, 2] as ``light_visibility`` returns it.

    Returns:
        [N, 3] sRGB in [0, 1].
    """
    normals = F.normalize(normals, dim=1, eps=1e-20)
    base = srgb_to_linear(albedo)
    sky_seen, key_seen = visibility[:, :1], visibility[:, 1:]
    # Light that is blocked comes back once more from the blocking surface, in its colour.
    sky_seen = sky_seen / (1 - base * 0.8 * (1 - sky_seen))

    def light(direction: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        towards = F.normalize(normals.new_tensor(direction), dim=0)
        return towards, (normals @ towards)[:, None]

    key, key_cosine = light(_KEY)
    up = (0.5 - 0.5 * normals[:, 1:2]) ** 1.2
    ambient = (up * normals.new_tensor(_SKY_COLOR) + (1 - up) * normals.new_tensor(_GROUND_COLOR)) * sky_seen
    direct = ((key_cosine + 0.12) / 1.12).clamp(min=0) * key_seen * normals.new_tensor(_KEY_COLOR)
    fill = light(_FILL)[1].clamp(min=0) * sky_seen * normals.new_tensor(_FILL_COLOR)
    diffuse = base * (ambient + direct + fill)

    grazing = (1 - (normals * views).sum(1, keepdim=True)).clamp(0, 1)
    rim = grazing**3 * (light(_RIM)[1] + 0.3).clamp(min=0) * sky_seen * normals.new_tensor(_RIM_COLOR)
    half = F.normalize(key + views, dim=1)
    gloss = _GLOSS * (normals * half).sum(1, keepdim=True).clamp(min=0) ** _SHININESS * key_seen
    return linear_to_srgb(_shoulder(diffuse + (0.25 + base) * 0.45 * rim + gloss))


def _shoulder(color: Tensor) -> Tensor:
    """Leave the shadows and middle tones, bend the highlights so that they reach white late."""
    start = 0.6
    bent = start + (1 - start) * (1 - torch.exp(-(color - start) / (1 - start)))
    return torch.where(color > start, bent, color)
