"""Figures made of renderings: meshes on photographs, views from other sides, sheets of pictures with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmetro.visualization.cameras import Array, Camera, OrthographicCamera, as_vertices, turn
from fastmetro.visualization.render import composite, render_floor_shadow, render_mesh, to_image

PAPER = (0.965, 0.965, 0.97)
"""Background (sRGB) of pictures without a photograph."""
_INK = (58, 62, 70)


def as_picture(image: Image.Image | Array) -> Tensor:
    """float32 [H, W, 3] in [0, 1] from a Pillow image or [H, W, 3] uint8 or floats in [0, 1].

    Raises:
        ValueError: the shape is another.
    """
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    tensor = torch.as_tensor(image)
    if tensor.dim() != 3 or tensor.shape[2] != 3:
        raise ValueError(f"image must be [H, W, 3], got {tuple(tensor.shape)}")
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()


def overlay(
    image: Image.Image | Array,
    vertices: Array,
    faces: Array,
    camera: Camera,
    *,
    opacity: float = 0.92,
    **options: Any,
) -> Image.Image:
    """Draw a mesh over a photograph.

    Args:
        image: The photograph: Pillow image, or [H, W, 3] uint8 or floats in [0, 1].
        vertices: [V, 3], or [B, V, 3] for several meshes of one topology; of these the nearer (by mean depth) covers
            the farther.
        faces: [F, 3].
        camera: Projects to the photograph's pixels.
        opacity: Of the mesh, in [0, 1].
        options: For ``render_mesh``.
    """
    picture = as_picture(image)
    height, width, _ = picture.shape
    layers = render_mesh(vertices, faces, camera, (height, width), **options).cpu()
    depth = as_vertices(vertices)[..., 2].mean(1)
    for index in depth.argsort(descending=True).tolist():
        picture = composite(layers[index], picture, opacity)
    return to_image(picture)


def view(
    vertices: Array,
    faces: Array,
    size: int | tuple[int, int],
    degrees: float = 0.0,
    tilt: float = 0.0,
    background: tuple[float, float, float] | None = PAPER,
    floor: bool = False,
    **options: Any,
) -> Image.Image:
    """Picture of one mesh, turned about the vertical axis and framed; degrees=90 is the side view.

    Args:
        vertices: [V, 3], y down.
        faces: [F, 3].
        size: Side, or (height, width), in pixels.
        degrees: Angle about the vertical axis.
        tilt: Degrees by which the viewer looks down.
        background: sRGB colour, or None for a transparent picture.
        floor: Throw a soft shadow on a floor; best with a tilt of about 10, and only with a background.
        options: For ``render_mesh``.
    """
    return turntable(vertices, faces, size, [degrees], tilt, background, floor, **options)[0]


def turntable(
    vertices: Array,
    faces: Array,
    size: int | tuple[int, int],
    angles: int | Sequence[float] = 8,
    tilt: float = 0.0,
    background: tuple[float, float, float] | None = PAPER,
    floor: bool = False,
    **options: Any,
) -> list[Image.Image]:
    """Pictures of one mesh from several sides, all at one scale.

    Args:
        vertices: [V, 3], y down.
        faces: [F, 3].
        size: Side, or (height, width), in pixels.
        angles: Degrees about the vertical axis, or into how many views a full turn is divided.
        tilt: Degrees by which the viewer looks down.
        background: sRGB colour, or None for transparent pictures.
        floor: Throw a soft shadow on a floor; best with a tilt of about 10, and only with a background.
        options: For ``render_mesh``.
    """
    if isinstance(angles, int):
        angles = [360.0 * index / angles for index in range(angles)]
    shape = (size, size) if isinstance(size, int) else size
    turned = torch.cat([turn(vertices, angle, tilt)[:1] for angle in angles])
    cameras = OrthographicCamera.fit(turned, shape)
    radians = math.radians(tilt)
    up = turned.new_tensor([0.0, -math.cos(radians), -math.sin(radians)])
    pictures = []
    for index in range(len(turned)):  # one at a time: memory, not speed, is short at high resolution
        camera = cameras.item(index)
        picture = render_mesh(turned[index], faces, camera, shape, **options)[0]
        if background is not None:
            behind: Array | tuple[float, float, float] = background
            if floor:
                behind = composite(render_floor_shadow(turned[index], faces, up, camera, shape), background)
            picture = composite(picture, behind)
        pictures.append(to_image(picture))
    return pictures


def contact_sheet(
    pictures: Sequence[Image.Image | Array],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    gap: int = 10,
    background: tuple[float, float, float] = PAPER,
) -> Image.Image:
    """Arrange pictures in a grid, each with a caption below it.

    Args:
        pictures: Pillow images or arrays; the largest width and height make the cell, smaller ones are centred.
        captions: One line each, or None.
        columns: Pictures in a row; by default close to a square.
        gap: Space between and around the cells in pixels.
        background: sRGB colour.

    Raises:
        ValueError: there is no picture, or another number of captions.
    """
    images = [p if isinstance(p, Image.Image) else to_image(as_picture(p)) for p in pictures]
    if not images:
        raise ValueError("pictures must hold at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions for {len(images)} pictures")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(i.width for i in images), max(i.height for i in images)
    font = ImageFont.load_default(size=max(11, width // 20))
    line = round(font.getbbox("Ag")[3] * 1.7) if captions is not None else 0
    size = (gap + columns * (width + gap), gap + rows * (height + line + gap))
    sheet = Image.new("RGB", size, tuple(round(c * 255) for c in background))
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left = gap + index % columns * (width + gap)
        top = gap + index // columns * (height + line + gap)
        corner = (left + (width - image.width) // 2, top + (height - image.height) // 2)
        sheet.paste(image, corner, image if image.mode == "RGBA" else None)
        if captions is not None:
            middle = (left + width / 2, top + height + line / 2)
            draw.text(middle, captions[index], fill=_INK, font=font, anchor="mm")
    return sheet
