"""Reading photographs and cutting out the square crop that the network sees."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fastmetro.data.limits import MAX_PIXELS
from fastmetro.data.synthetic.dataset import normalize_images

CROP_SIZE = 224
"""Side of the network's input in pixels (paper, Section 4.1)."""
BOX_MARGIN = 1.2
"""A person box is made square and this much larger, as the published label files were made."""
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class CropWindow:
    """The square of the original image that becomes the crop: left, top and side, in original pixels."""

    left: float
    top: float
    side: float

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Crop coordinates in [-1, 1] -> pixels of the original image; points are [..., 2]."""
        return (points + 1.0) * (self.side / 2.0) + np.array([self.left, self.top])


def load_image(path: str | Path) -> np.ndarray:
    """Read an image file upright (EXIF orientation applied) as uint8 RGB, shape [H, W, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image that Pillow reads, is truncated, or claims more than
            ``MAX_PIXELS`` pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {str(path)!r} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below replaces it
            with Image.open(path) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise ValueError(
                        f"image {str(path)!r} claims {opened.width} x {opened.height} pixels; at most "
                        f"{MAX_PIXELS} are read"
                    )
                return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {str(path)!r} cannot be read: {error}") from error


def crop_window(height: int, width: int, box: tuple[float, float, float, float] | None) -> CropWindow:
    """The square to cut out of an image.

    Args:
        height: Image height in pixels.
        width: Image width in pixels.
        box: Person box (left, top, right, bottom) in pixels; it becomes a square around its centre, enlarged by
            ``BOX_MARGIN``, and may reach outside the image. None takes the largest centred square, as the published
            demo does.

    Raises:
        ValueError: the box is not finite, is empty, or lies outside the image.
    """
    if box is None:
        side = float(min(height, width))
        return CropWindow((width - side) / 2, (height - side) / 2, side)
    left, top, right, bottom = box
    if not np.all(np.isfinite(box)) or right - left < 1 or bottom - top < 1:
        raise ValueError(f"box must be left, top, right, bottom with a side of at least one pixel, got {box}")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"box {box} lies outside the image of {width} x {height} pixels")
    side = BOX_MARGIN * max(right - left, bottom - top)
    return CropWindow((left + right - side) / 2, (top + bottom - side) / 2, side)


def cut_crop(image: np.ndarray, window: CropWindow, size: int = CROP_SIZE) -> np.ndarray:
    """Cut ``window`` out of ``image`` and resize it with antialiasing; what lies outside the image is black.

    Args:
        image: uint8 [H, W, 3].
        window: The square to cut out.
        size: Side of the result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    # The part inside the image is resized exactly (Pillow resamples from a fractional box), then pasted.
    left, top = max(window.left, 0.0), max(window.top, 0.0)
    right, bottom = min(window.left + window.side, float(width)), min(window.top + window.side, float(height))
    scale = size / window.side
    x0, y0 = round((left - window.left) * scale), round((top - window.top) * scale)
    x1, y1 = round((right - window.left) * scale), round((bottom - window.top) * scale)
    result = Image.new("RGB", (size, size))
    if x1 > x0 and y1 > y0:
        part = Image.fromarray(image).resize(
            (x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
        result.paste(part, (x0, y0))
    return np.asarray(result)


def to_input(crop: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] RGB -> the network's float32 input [3, H, W], with ImageNet's mean and deviation."""
    return normalize_images(torch.from_numpy(np.array(crop)).permute(2, 0, 1).unsqueeze(0))[0]
