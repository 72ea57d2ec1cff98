"""The pictures of one prediction: over the photograph, and from the side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastmetro.files import replacing
from fastmetro.visualization.cameras import OrthographicCamera
from fastmetro.visualization.overlay import overlay, view

if TYPE_CHECKING:
    from fastmetro.inference.prediction import Prediction

LARGEST_SIDE = 1600
"""Overlays of larger photographs are made at this size."""


def overlay_picture(prediction: Prediction, image: np.ndarray) -> Image.Image:
    """The mesh over the photograph it was recovered from, at most ``LARGEST_SIDE`` pixels a side.

    Args:
        prediction: What the predictor returned for the image.
        image: uint8 RGB [H, W, 3], the image that the predictor saw.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    scale = picture.width / image.shape[1]
    window = prediction.window
    camera = OrthographicCamera.from_weak_perspective(
        prediction.camera, window.left * scale, window.top * scale, window.side * scale
    )
    return overlay(picture, prediction.vertices, prediction.faces, camera)


def side_picture(prediction: Prediction, size: int = 512) -> Image.Image:
    """The mesh seen from its side, on a plain ground."""
    return view(prediction.vertices, prediction.faces, size, degrees=90.0)


def save_pictures(prediction: Prediction, image: np.ndarray, out: Path, name: str) -> list[Path]:
    """Write ``NAME_overlay.png`` and ``NAME_side.png`` to ``out``; returns the paths."""
    pictures = {
        out / f"{name}_overlay.png": overlay_picture(prediction, image),
        out / f"{name}_side.png": side_picture(prediction),
    }
    for path, picture in pictures.items():
        with replacing(path) as temporary:
            picture.save(temporary, format="PNG")
    return list(pictures)
