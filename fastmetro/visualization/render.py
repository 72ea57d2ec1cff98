"""Headless rendering of meshes with the project's rasteriser: no OpenGL, no display, the same on CPU and GPU."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastmetro.visualization.cameras import Array, Camera, as_vertices
from fastmetro.visualization.lighting import light_visibility, shade, vertex_normals, visibility_at
from fastmetro_kernels import RasterOutput, interpolate, rasterize

PORCELAIN = (0.66, 0.75, 0.88)
"""Default colour (sRGB) of meshes."""
CLAY = (0.83, 0.76, 0.69)
"""A warm second colour, for what is compared with it."""
_LINE_COLOR = (0.16, 0.21, 0.31)
_SHADOW_COLOR = (0.12, 0.13, 0.17)
_FLOOR_POINTS = 128


@torch.no_grad()
def render_mesh(
    vertices: Array,
    faces: Array,
    camera: Camera,
    size: int | tuple[int, int],
    *,
    color: tuple[float, float, float] | Array = PORCELAIN,
    supersampling: int = 3,
    shadows: bool = True,
    smooth: bool = True,
    wireframe: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Render meshes on a transparent background.

    Args:
        vertices: [V, 3] or [B, V, 3], x right, y down, z away from the camera; the picture is made on their device.
        faces: [F, 3] integers.
        camera: ``OrthographicCamera``, ``PerspectiveCamera``, or anything with ``project`` and ``perspective``.
        size: Side, or (height, width), of the picture in pixels.
        color: sRGB in [0, 1]: one colour [3], or one per vertex [V, 3] or [B, V, 3].
        supersampling: The picture is made this many times larger, then averaged, for smooth outlines.
        shadows: Soft shadows and hidden sky, from about a hundred small depth maps of the mesh.
        smooth: Shade with normals of the vertices, interpolated; else every face is flat.
        wireframe: Width of the triangles' drawn edges in pixels; 0 draws none.
        backend: Of the rasteriser.

    Returns:
        float32 [B, height, width, 4]: sRGB and coverage in [0, 1]; colours are not multiplied by coverage.

    Raises:
        TypeError: ``faces`` are not integers.
        ValueError: a shape or size is wrong, or ``supersampling`` is below 1.
    """
    points = as_vertices(vertices)
    triangles = torch.as_tensor(faces, device=points.device)
    height, width = (size, size) if isinstance(size, int) else size
    if supersampling < 1:
        raise ValueError(f"supersampling must be at least 1, got {supersampling}")
    projected = camera.project(points)
    factor = projected.new_tensor([supersampling, supersampling, 1.0])
    raster = rasterize(
        projected * factor,
        triangles,
        height * supersampling,
        width * supersampling,
        perspective_correct=camera.perspective,
        backend=backend,
    )
    corners = triangles.long()
    albedo = _vertex_colors(color, points)
    normals = vertex_normals(points, corners)
    visibility = light_visibility(points, normals, corners) if shadows else torch.ones_like(points[..., :2])
    covered = (raster.face_index >= 0).nonzero(as_tuple=True)
    values = _at_pixels(torch.cat([points, normals, albedo, visibility], 2), corners, raster, covered)
    position, normal, base, seen = values.split([3, 3, 3, 2], 1)
    views = camera.directions(position, covered[0])
    flat = _face_normals(points, corners, raster, covered)
    # Both sides of an open mesh are lit. The face decides, for at an outline a smooth normal may point away.
    away = (flat * views).sum(1, keepdim=True) < 0
    normal = torch.where(away, -1.0, 1.0) * (normal if smooth else flat)
    if wireframe > 0:
        line = _edge_coverage(projected, corners, raster, covered, wireframe, supersampling)
        base = torch.lerp(base, base.new_tensor(_LINE_COLOR), line)
    pixels = points.new_zeros((*raster.face_index.shape, 4))
    pixels[covered] = F.pad(shade(normal, views, base, seen), (0, 1), value=1.0)
    return _average(pixels, supersampling)


def _vertex_colors(color: tuple[float, float, float] | Array, points: Tensor) -> Tensor:
    colors = torch.as_tensor(color, dtype=torch.float32, device=points.device)
    try:
        return colors.expand(points.shape)
    except RuntimeError:
        raise ValueError(
            f"color must be [3], [V, 3] or [B, V, 3] for vertices {tuple(points.shape)}, got {tuple(colors.shape)}"
        ) from None


def _at_pixels(attributes: Tensor, faces: Tensor, raster: RasterOutput, covered: tuple[Tensor, ...]) -> Tensor:
    """Attributes [B, V, C] interpolated at the covered pixels only, [N, C]."""
    item = covered[0]
    corners = faces[raster.face_index[covered].long()]
    weights = raster.barycentrics[covered]
    terms = [weights[:, k, None] * attributes[item, corners[:, k]] for k in range(3)]
    return terms[0] + terms[1] + terms[2]


def _face_normals(points: Tensor, faces: Tensor, raster: RasterOutput, covered: tuple[Tensor, ...]) -> Tensor:
    a, b, c = (points[:, faces[:, corner]] for corner in range(3))
    normals = F.normalize(torch.linalg.cross(b - a, c - a, dim=2), dim=2, eps=1e-20)
    return normals[covered[0], raster.face_index[covered].long()]


def _edge_coverage(
    projected: Tensor,
    faces: Tensor,
    raster: RasterOutput,
    covered: tuple[Tensor, ...],
    line_width: float,
    supersampling: int,
) -> Tensor:
    """[N, 1] in [0, 1]: how much of a drawn triangle edge lies on each covered sample."""
    corners = faces[raster.face_index[covered].long()]
    xy = torch.stack([projected[covered[0], corners[:, k], :2] for k in range(3)], 1)
    opposite = (xy.roll(-2, 1) - xy.roll(-1, 1)).norm(dim=2).clamp(min=1e-9)
    u, v = xy[:, 1] - xy[:, 0], xy[:, 2] - xy[:, 0]
    doubled_area = (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).abs()[:, None]
    # A barycentric coordinate times the triangle's height over that edge is the distance to the edge in pixels.
    distance = (raster.barycentrics[covered] * doubled_area / opposite).amin(1, keepdim=True)
    return ((line_width / 2 - distance) * supersampling + 0.5).clamp(0, 1)


def _average(pixels: Tensor, factor: int) -> Tensor:
    """Average blocks of factor x factor samples of RGBA whose colour is 0 where alpha is 0."""
    mean = F.avg_pool2d(pixels.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    alpha = mean[..., 3:]
    return torch.cat([mean[..., :3] / alpha.clamp(min=1e-6), alpha], 3)


@torch.no_grad()
def render_floor_shadow(
    vertices: Tensor, faces: Array, up: Tensor, camera: Camera, size: tuple[int, int], strength: float = 0.75
) -> Tensor:
    """The soft shadow that a mesh throws on an invisible floor below it, to be put behind its rendering.

    Args:
        vertices: float32 [V, 3], the mesh.
        faces: [F, 3].
        up: Unit vector [3] away from the floor, which touches the lowest vertex.
        camera: As for ``render_mesh``.
        size: Height and width of the picture in pixels.
        strength: Opacity where no light arrives.

    Returns:
        float32 [H, W, 4] as ``render_mesh`` returns it.
    """
    triangles = torch.as_tensor(faces, device=vertices.device).long()
    heights = vertices @ up
    middle = (vertices.amin(0) + vertices.amax(0)) / 2
    reach = 0.9 * (vertices - middle).norm(dim=1).max()
    across = F.normalize(torch.linalg.cross(up, up.new_tensor([0.0, 0.0, 1.0]), dim=0), dim=0)
    along = torch.linalg.cross(up, across, dim=0)
    steps = torch.linspace(-1, 1, _FLOOR_POINTS, device=vertices.device)
    u, v = (grid.reshape(-1, 1) for grid in torch.meshgrid(steps, steps, indexing="ij"))
    floor = middle + (heights.min() - middle @ up) * up + reach * (u * across + v * along)
    seen = visibility_at(floor, up.expand(len(floor), 3), vertices, triangles)
    dark = (1 - seen).T.reshape(1, 2, _FLOOR_POINTS, _FLOOR_POINTS)
    for _ in range(3):  # hides the steps between single directions
        dark = F.avg_pool2d(dark, 5, stride=1, padding=2, count_include_pad=False)
    dark = (0.75 * dark[0, 0] + 0.25 * dark[0, 1]).reshape(-1, 1)
    fade = (1 - (u**2 + v**2)).clamp(min=0) ** 2  # nothing of the floor's border shows
    index = torch.arange(_FLOOR_POINTS**2, device=vertices.device).view(_FLOOR_POINTS, _FLOOR_POINTS)
    a, b, c, d = (part.reshape(-1) for part in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
    cells = torch.cat([torch.stack([a, b, c], 1), torch.stack([b, d, c], 1)])
    raster = rasterize(camera.project(floor[None]), cells, *size, perspective_correct=camera.perspective)
    alpha = interpolate((dark * fade * strength)[None], cells, raster)[0]
    return torch.cat([alpha.new_tensor(_SHADOW_COLOR).expand(*size, 3), alpha], 2)


def composite(rgba: Tensor, background: Array | tuple[float, float, float], opacity: float = 1.0) -> Tensor:
    """Put a rendering on a background.

    Args:
        rgba: [..., H, W, 4] as ``render_mesh`` returns it.
        background: sRGB in [0, 1]: one colour [3], or pictures that broadcast to [..., H, W, 3].
        opacity: Of the rendering, in [0, 1].

    Returns:
        [..., H, W, 3] in [0, 1].
    """
    behind = torch.as_tensor(background, dtype=torch.float32, device=rgba.device)
    return torch.lerp(behind.expand(*rgba.shape[:-1], 3), rgba[..., :3], rgba[..., 3:] * opacity)


def to_image(picture: Array) -> Image.Image:
    """A Pillow image from floats in [0, 1], [H, W, 3] or [H, W, 4].

    Raises:
        ValueError: the shape is another.
    """
    tensor = torch.as_tensor(picture).detach().cpu()
    if tensor.dim() != 3 or tensor.shape[2] not in (3, 4):
        raise ValueError(f"picture must be [H, W, 3] or [H, W, 4], got {tuple(tensor.shape)}")
    bytes_ = (tensor.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(bytes_.numpy()))
