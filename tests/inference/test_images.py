"""Reading photographs, cutting crops, and the way back from crop coordinates to pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmetro.inference import images


def gradient(height: int, width: int) -> np.ndarray:
    """An image whose red and green channels are the pixel's x and y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 128)], -1).clip(0, 255).astype(np.uint8)


def test_centre_crop_is_the_largest_centred_square() -> None:
    assert images.crop_window(100, 200, None) == images.CropWindow(50.0, 0.0, 100.0)


def test_box_becomes_an_enlarged_square_around_its_centre() -> None:
    window = images.crop_window(400, 400, (100, 50, 200, 250))
    assert window.side == pytest.approx(1.2 * 200)
    assert (window.left + window.side / 2, window.top + window.side / 2) == pytest.approx((150, 150))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 50), "side of at least one pixel"),
        ((0, 0, float("nan"), 5), "finite|side"),
        ((500, 0, 600, 50), "outside"),
    ],
)
def test_bad_boxes_are_refused(box: tuple[float, float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.crop_window(100, 100, box)


def test_crop_content_matches_the_window() -> None:
    image = gradient(250, 250)
    crop = images.cut_crop(image, images.CropWindow(20, 40, 112.0), 224).astype(float)
    # Output pixel i covers the input around left + (i + 0.5) / 2 - 0.5.
    expected = 20 + (np.arange(224) + 0.5) / 2 - 0.5
    assert np.abs(crop[112, 4:-4, 0] - expected[4:-4]).max() <= 1.0
    assert np.abs(crop[4:-4, 112, 1] - (expected[4:-4] + 20)).max() <= 1.0


def test_crop_outside_the_image_is_black_and_the_rest_is_in_place() -> None:
    image = np.full((100, 100, 3), 200, np.uint8)
    crop = images.cut_crop(image, images.CropWindow(-50, -50, 200.0), 200)
    assert (crop[:49] == 0).all() and (crop[:, :49] == 0).all() and (crop[151:] == 0).all()
    assert (crop[52:148, 52:148] == 200).all()


def test_window_maps_crop_coordinates_to_pixels() -> None:
    window = images.CropWindow(10, 20, 100)
    np.testing.assert_allclose(
        window.to_image(np.array([[-1.0, -1.0], [1.0, 1.0], [0, 0]])), [[10, 20], [110, 120], [60, 70]]
    )


def test_input_is_normalised() -> None:
    x = images.to_input(np.full((4, 5, 3), 255, np.uint8))
    assert x.shape == (3, 4, 5)
    torch.testing.assert_close(
        x[:, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


def test_orientation_tag_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(40, 80))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.load_image(tmp_path / "turned.jpg").shape == (80, 40, 3)


def test_missing_broken_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images.load_image(tmp_path / "none.png")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="cannot be read"):
        images.load_image(tmp_path / "text.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match="cannot be read"):
        images.load_image(tmp_path / "cut.png")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(png + b"\0" * 100)
    with pytest.raises(ValueError, match=r"claims|cannot be read"):
        images.load_image(tmp_path / "bomb.png")
