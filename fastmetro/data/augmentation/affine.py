"""The crop as it should be: one affine map from the crop to the photograph, sub-pixel exact and anti-aliased.

Coordinates are continuous: pixel i covers [i, i + 1), in the photograph and in the crop alike, and what lies outside of
the photograph is black; so is a crop of which the photograph would fill less than a pixel. Every pixel of the crop is
the mean of 2 x 2 bilinear samples. Where it covers 3 or more pixels across, the photograph is averaged over whole
blocks first, of as many pixels as lie between samples. So what is cut out never has more than some (4.3 S)^2 pixels,
whatever the box.

Geometry of a cut: float64 [6], a 2 x 3 matrix from continuous crop coordinates to those of the cut's pixels.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from fastmetro.data.augmentation.cut import Cut, empty_cut
from fastmetro.data.augmentation.draw import Draw
from fastmetro_kernels.fused import CropMap


def crop_matrix(center: np.ndarray, scale: float, draw: Draw, size: int) -> np.ndarray:
    """float64 [2, 3], from pixels of the photograph to pixels of the crop, [0, size] in both directions.

    The square around ``center`` with sides of 200 * scale * draw.scale pixels becomes the crop, turned
    counter-clockwise by the draw's rotation, then flipped.
    """
    linear = _turn(draw) * (size / (200.0 * scale * draw.scale))
    return np.column_stack([linear, size / 2 - linear @ np.asarray(center, np.float64)])


def _turn(draw: Draw) -> np.ndarray:
    """float64 [2, 2]: orthogonal, the rotation and the flip."""
    cosine, sine = math.cos(math.radians(draw.rotation)), math.sin(math.radians(draw.rotation))
    turn = np.array([[cosine, sine], [-sine, cosine]])
    return np.diag([-1.0, 1.0]) @ turn if draw.flip else turn


def cut_affine(image: np.ndarray, center: np.ndarray, scale: float, draw: Draw, size: int) -> Cut:
    """The pixels that the crop needs, averaged over blocks where it is much smaller than its box.

    Args:
        image: uint8 [H, W, 3].
        center: [2], of the box, pixels.
        scale: side of the box / 200, pixels.
        draw: of the sample.
        size: S, side of the crop.
    """
    pitch = 200.0 * scale * draw.scale / size  # pixels of the photograph per pixel of the crop
    linear = _turn(draw).T * pitch
    start = np.asarray(center, np.float64) - linear @ np.full(2, size / 2)
    corners = np.array([[0, 0], [size, 0], [0, size], [size, size]]) @ linear.T + start
    if pitch > max(image.shape[:2]):  # all of it would be less than a pixel
        return empty_cut(np.zeros(6))
    block = max(round(pitch / 2), 1)
    limits = np.array([image.shape[1], image.shape[0]])
    low = np.clip(np.floor(corners.min(0)) - (block + 1), 0, limits).astype(np.int64)
    high = np.clip(np.ceil(corners.max(0)) + (block + 1), 0, limits).astype(np.int64)
    if bool((low >= high).any()):
        return empty_cut(np.zeros(6))
    blocks = np.minimum(high - low, block)
    pixels = _block_means(image[low[1] : high[1], low[0] : high[0]], int(blocks[0]), int(blocks[1]))
    matrix = np.column_stack([linear, start - low]) / blocks[:, None]
    return Cut(pixels, matrix.reshape(-1))


def _block_means(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Means of blocks of that size; those at the right and at the bottom end in black."""
    if width == height == 1:
        return pixels
    rows, columns = -(-pixels.shape[0] // height), -(-pixels.shape[1] // width)
    below, beside = rows * height - pixels.shape[0], columns * width - pixels.shape[1]
    padded = cv2.copyMakeBorder(pixels, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return cv2.resize(padded, (columns, rows), interpolation=cv2.INTER_AREA)


def render_affine(cut: Cut, size: int) -> np.ndarray:
    """The crop, uint8 [size, size, 3]."""
    if cut.pixels.size == 0:
        return np.zeros((size, size, 3), np.uint8)
    matrix = cut.geometry.reshape(2, 3).copy()
    # From the middles of half pixels of the crop to numbers of the cut's pixels.
    matrix[:, 2] += matrix[:, :2] @ np.full(2, 0.25) - 0.5
    matrix[:, :2] /= 2
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    samples = cv2.warpAffine(cut.pixels, matrix, (2 * size, 2 * size), flags=flags, borderMode=cv2.BORDER_CONSTANT)
    return cv2.resize(samples, (size, size), interpolation=cv2.INTER_AREA)


def map_affine(geometry: Tensor, size: int) -> CropMap:
    """The samples of :func:`render_affine` for geometries [B, 6], on their device."""
    middle = torch.arange(2 * size, device=geometry.device, dtype=geometry.dtype) / 2 + 0.25
    # Float64 up to here: the numbers of pixels are exact to 1e-10, so that borders fall as in the worker.
    matrix = geometry.view(-1, 2, 3).clone()
    matrix[:, :, 2] -= 0.5
    middles = middle.expand(len(geometry), -1)
    weights = middles.new_full(middles.shape, 0.5, dtype=torch.float32)
    return CropMap(matrix.flatten(1), middles, middles, weights, weights, geometry.new_zeros(len(geometry), 2))
