"""The crop exactly as the published loaders make it (protocol, 3.3 and quirk 2), for `compat="published"`.

Box corners are truncated to whole pixels; the box is filled with black outside of the photograph, enlarged so that it
can be turned, turned by `cv2.warpAffine`, cut down again, and resized by `cv2.resize`, both bilinear on float64 and
without anti-aliasing. `cv2.warpAffine` rounds positions to 1/32 of a pixel on float64.

Where the published code fails, the crop is black: a box without pixels or wholly outside of the photograph. A box so
small that it need not be enlarged, which the published code fails to turn, is turned as it is. Boxes above ``MAX_SIDE``
are black, too; large ones below it are sampled without being filled, to the same pixels, so that memory stays bounded.

Geometry of a cut: float64 [11], the width and height of the box, the width of its enlargement, column and row of the
cut's pixels in the enlarged box, and a 2 x 3 matrix from pixels of the turned box to those of the enlarged one.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from fastmetro.data.augmentation.cut import Cut, empty_cut
from fastmetro.data.augmentation.draw import Draw
from fastmetro_kernels.fused import CropMap

MAX_SIDE = 1 << 20
"""Pixels of the photograph. Positions in boxes up to here, times 1024, fit the 32-bit integers of OpenCV."""
MAX_FILLED = 2048
"""Larger boxes are not filled: three channels in float32 and again in float64 would take more than 150 MB."""
_POSITION, _SUBPIXEL = 1024, 32
"""cv2.warpAffine adds positions up in 1/1024 of a pixel, and rounds the sum to 1/32."""


class _Box(NamedTuple):
    """Whole pixels: upper left corner, and the sides."""

    left: int
    top: int
    width: int
    height: int


def point_matrix(center: np.ndarray, scale: float, draw: Draw, size: int) -> np.ndarray:
    """float64 [3, 3], from the photograph to the crop, without the flip, with the published order of operations.

    The order decides in which direction a position at a whole pixel is truncated.
    """
    side = 200 * (draw.scale * scale)
    matrix = np.zeros((3, 3))
    matrix[0, 0] = matrix[1, 1] = size / side
    matrix[0, 2] = size * (-float(center[0]) / side + 0.5)
    matrix[1, 2] = size * (-float(center[1]) / side + 0.5)
    matrix[2, 2] = 1
    if draw.rotation == 0:
        return matrix
    angle = -draw.rotation * np.pi / 180
    sine, cosine = np.sin(angle), np.cos(angle)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    to_middle, back = np.eye(3), np.eye(3)
    to_middle[:2, 2], back[:2, 2] = -size / 2, size / 2
    return np.dot(back, np.dot(turn, np.dot(to_middle, matrix)))


def transform_points(points: np.ndarray, center: np.ndarray, scale: float, draw: Draw, size: int) -> np.ndarray:
    """Points [N, 2] of the photograph in the crop, before the flip: whole pixels, 1 more than truncated towards 0."""
    matrix = point_matrix(center, scale, draw, size)
    # A product per point, not one for all: another order of additions could fall on the other side of a whole pixel.
    columns = np.column_stack([points.astype(np.float64), np.ones(len(points))])[:, :, None]
    return np.trunc(np.matmul(matrix, columns)[:, :2, 0]) + 1


def _box(center: np.ndarray, scale: float, draw: Draw, size: int) -> _Box | None:
    """The box in whole pixels; None where it has none or too many."""
    factor, _, x, _, _, y = point_matrix(center, scale, Draw(scale=draw.scale), size)[:2].reshape(-1).tolist()
    # The bits of torch.inverse, as published, at a tenth of its time: -x / factor truncates elsewhere.
    inverse = 1 / factor
    corners = [-x * inverse, -y * inverse, size * inverse - x * inverse, size * inverse - y * inverse]
    left, top, right, bottom = np.trunc(corners)
    width, height = right - left, bottom - top
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        return None
    return _Box(int(left), int(top), int(width), int(height))


def cut_published(image: np.ndarray, center: np.ndarray, scale: float, draw: Draw, size: int) -> Cut:
    """The pixels of the photograph inside the enlarged box; arguments as of :func:`~.affine.cut_affine`."""
    box = _box(center, scale, draw, size)
    if box is None:
        return empty_cut(np.zeros(11))
    pad = 0
    matrix = np.eye(2, 3)
    if draw.rotation != 0:
        pad = int(np.linalg.norm(np.array([box.width, box.height])) / 2 - float(box.height) / 2)
        middle = ((box.width + 2 * pad - 1) * 0.5, (box.height + 2 * pad - 1) * 0.5)
        matrix = _inverse(cv2.getRotationMatrix2D(middle, draw.rotation, 1.0))
    left, top = box.left - pad, box.top - pad
    x0, x1 = max(left, 0), min(left + box.width + 2 * pad, image.shape[1])
    y0, y1 = max(top, 0), min(top + box.height + 2 * pad, image.shape[0])
    if x0 >= x1 or y0 >= y1:
        return empty_cut(np.zeros(11))
    geometry = np.array([box.width, box.height, pad, x0 - left, y0 - top, *matrix.reshape(-1)], np.float64)
    return Cut(image[y0:y1, x0:x1], geometry)


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Of a 2 x 3 matrix, with the rounding of cv2.warpAffine, which is to the last bit that of what it does inside."""
    (a, b, x), (c, d, y) = matrix.tolist()
    factor = 1.0 / (a * d - b * c)
    a, b, c, d = d * factor, -b * factor, -c * factor, a * factor
    return np.array([[a, b, -a * x - b * y], [c, d, -c * x - d * y]])


def is_small(cut: Cut) -> bool:
    """Whether the whole box may be filled."""
    width, height, pad = cut.geometry[:3]
    return bool(max(width, height) + 2 * pad <= MAX_FILLED)


def render_published(cut: Cut, size: int) -> np.ndarray:
    """The crop before the flip, float64 [size, size, 3]; the cut must be small (:func:`is_small`)."""
    if cut.pixels.size == 0:
        return np.zeros((size, size, 3))
    width, height, pad, x, y = (int(value) for value in cut.geometry[:5])
    below, beside = height + 2 * pad - y - cut.pixels.shape[0], width + 2 * pad - x - cut.pixels.shape[1]
    box = cv2.copyMakeBorder(cut.pixels, y, below, x, beside, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    matrix = cut.geometry[5:].reshape(2, 3)
    if not np.array_equal(matrix, np.eye(2, 3)):
        box = _turned(box, matrix, width, height, pad)
    elif pad:
        box = box[pad : pad + height, pad : pad + width]
    return cv2.resize(box.astype(np.float64), (size, size), interpolation=cv2.INTER_LINEAR)


def _turned(enlarged: np.ndarray, matrix: np.ndarray, width: int, height: int, pad: int) -> np.ndarray:
    """float32 [height, width, 3]: the middle of what cv2.warpAffine makes of the enlarged box in float64, bit for bit.

    Only the box is computed, half of the whole, and in float32, which loses nothing: weights are multiples of 1/1024,
    pixels have 8 bits, and so sums have 18.
    """
    columns, rows = np.arange(pad, pad + width), np.arange(pad, pad + height)
    along = np.rint(np.outer(matrix[:, 0], columns) * _POSITION).astype(np.int32)
    down = np.rint((np.outer(matrix[:, 1], rows) + matrix[:, 2:]) * _POSITION).astype(np.int32)
    x, y = _added_up(down[0], along[0]), _added_up(down[1], along[1])
    return cv2.remap(enlarged.astype(np.float32), x, y, cv2.INTER_LINEAR, borderValue=(0, 0, 0))


def _added_up(down: np.ndarray, along: np.ndarray) -> np.ndarray:
    """float32 [H, W]: pixels, rounded, of the sums of two parts of positions, int32 [H] and [W]."""
    step = _POSITION // _SUBPIXEL
    place = np.add.outer(down + step // 2, along)
    place //= step
    return np.divide(place, _SUBPIXEL, dtype=np.float32, casting="same_kind")


def map_published(geometry: Tensor, flip: Tensor, size: int) -> CropMap:
    """The samples of :func:`render_published` for geometries [B, 11], flipped where ``flip`` [B] holds.

    Positions of the turned box are to be rounded to 1/32 of a pixel as by OpenCV, in the same integers (``fixed``).
    """
    width, height, pad = geometry[:, :3].unbind(1)
    number = torch.arange(size, device=geometry.device, dtype=geometry.dtype)
    columns, column_weights = _taps(torch.where(flip[:, None], size - 1 - number, number), width, size)
    rows, row_weights = _taps(number.expand(len(geometry), size), height, size)
    pad = pad[:, None]
    return CropMap(geometry[:, 5:], columns + pad, rows + pad, column_weights, row_weights, geometry[:, 3:5])


def _taps(number: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels [B, 2S] of a box of that side [B] and their weights, for pixels [B, S] of a crop, as of cv2.resize."""
    place = ((number + 0.5) * (side / size)[:, None] - 0.5).float()
    last = (side - 1).float()[:, None]
    first = place.floor()
    share = torch.where((first < 0) | (first >= last), 0.0, place - first)
    first = torch.minimum(first.clamp_min(0), last)
    second = torch.minimum(first + 1, last)
    return (
        torch.stack([first, second], 2).flatten(1).double(),
        torch.stack([1 - share, share], 2).flatten(1),
    )
