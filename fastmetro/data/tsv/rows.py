"""What stands in the cells of a row: an image in base64, and a label as JSON. Both come from strangers."""

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastmetro.data.limits import MAX_PIXELS

Kind = Literal["body", "hand"]
MAX_LABEL_BYTES = 1 << 20
_FLOAT32 = np.finfo(np.float32).max
_LARGEST = 1e6
"""Pixels, metres and radians. No camera or body has more; sums of such numbers, and losses, would overflow."""
_LONGEST_DETAIL = 300
LONGEST_KEY = 200
"""Characters of a row's key in messages."""
_ORIENTATION = 0x0112  # of EXIF
_Turn = Image.Transpose
_TURNS = {2: _Turn.FLIP_LEFT_RIGHT, 3: _Turn.ROTATE_180, 4: _Turn.FLIP_TOP_BOTTOM, 5: _Turn.TRANSPOSE,
          6: _Turn.ROTATE_270, 7: _Turn.TRANSVERSE, 8: _Turn.ROTATE_90}  # fmt: skip
"""By orientation, what makes a picture upright; others are."""


class BadRow(ValueError):
    """A row that cannot be used.

    Attributes:
        problem: what kind of problem, in a few words that are the same for all such rows.
    """

    def __init__(self, problem: str, detail: str) -> None:
        # A detail may quote a file: a lone surrogate could not be printed, and a terminal obeys control characters.
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in detail[:_LONGEST_DETAIL])
        super().__init__(f"{problem}: {shown}{'...' * (len(detail) > _LONGEST_DETAIL)}")
        self.problem = problem


@dataclass(frozen=True)
class Shapes:
    """Sizes of a label's arrays: joints and pose parameters."""

    joints: int
    pose: int


SHAPES: dict[Kind, Shapes] = {"body": Shapes(24, 72), "hand": Shapes(21, 48)}
BETAS = 10
GENDERS = {"m": "male", "f": "female", "n": "neutral"} | {name: name for name in ("male", "female", "neutral", "none")}
"""What a label's gender may be, in any case, and what it is read as."""
DAMAGED = "damaged JPEG"
"""The problem of images that can be read, but not without a complaint."""
_COMPLAINTS = ("Corrupt JPEG data", "Premature end of JPEG file")
"""How libjpeg-turbo begins those that are about the picture; others are about features that it does not know."""


@dataclass(frozen=True)
class Label:
    """A label of the published files (body: 24 joints and 72 pose parameters; hand: 21 and 48).

    Attributes:
        center: float32 [2], of the box, pixels.
        scale: side of the box / 200, pixels.
        joints_2d: float32 [J, 3], x and y in pixels, and visibility.
        joints_3d: float32 [J, 4], metres, and confidence.
        pose: float32 [72] or [48], axis-angle of each joint.
        betas: float32 [10].
        has_joints_2d, has_joints_3d, has_smpl: whether these were measured.
        gender: "male", "female", "neutral" or "none"; a text that is none of ``GENDERS`` as it stands.
    """

    center: np.ndarray
    scale: float
    joints_2d: np.ndarray
    joints_3d: np.ndarray
    pose: np.ndarray
    betas: np.ndarray
    has_joints_2d: bool
    has_joints_3d: bool
    has_smpl: bool
    gender: str


def parse_label(text: bytes, kind: Kind, exact: bool = False) -> Label:
    """The label of a cell: JSON, a list whose first element is an object.

    Args:
        text: of the cell.
        kind: what the label is of.
        exact: keep box and 2D joints in float64. Published crops truncate them: a scale of 0.9 in float32 would lose a
            pixel.

    Raises:
        BadRow: broken JSON, a missing key, an array of another size, a number that is not finite or beyond a million
            (pixels, metres, radians), an empty box.
    """
    if len(text) > MAX_LABEL_BYTES:
        raise BadRow("label too long", f"{len(text)} bytes, at most {MAX_LABEL_BYTES} are read")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", str(error)) from None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        raise BadRow("broken JSON", "a list of objects is expected")
    found: dict[str, Any] = content[0]
    shapes = SHAPES[kind]
    center = _array(found, "center", (2,), exact)
    scale = float(_array(found, "scale", (), exact))
    if scale <= 0:
        raise BadRow("empty box", f"scale must be positive, got {scale}")
    gender = found.get("gender", "none")
    if not isinstance(gender, str):
        raise BadRow("wrong value", f"gender must be a text, got {gender!r}")
    return Label(
        center=center,
        scale=scale,
        joints_2d=_array(found, "2d_joints", (shapes.joints, 3), exact),
        joints_3d=_array(found, "3d_joints", (shapes.joints, 4)),
        pose=_array(found, "pose", (shapes.pose,)),
        betas=_array(found, "betas", (BETAS,)),
        has_joints_2d=bool(_array(found, "has_2d_joints", ())),
        has_joints_3d=bool(_array(found, "has_3d_joints", ())),
        has_smpl=bool(_array(found, "has_smpl", ())),
        # Another text is kept: training needs no gender, and must not lose the row.
        gender=GENDERS.get(gender.strip().lower(), gender),
    )


def _array(found: dict[str, Any], key: str, shape: tuple[int, ...], exact: bool = False) -> np.ndarray:
    """float32 (float64: ``exact``), of that shape; published labels may have a leading axis of 1."""
    if key not in found:
        raise BadRow("missing key", key)
    try:
        with np.errstate(over="ignore"):  # infinity, which is told below
            values = np.array(found[key], dtype=np.float64 if exact else np.float32)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("wrong value", f"{key} must be numbers, got {str(found[key])[:60]}") from None
    if values.shape == (1, *shape):
        values = values[0]
    if values.shape != shape:
        raise BadRow("wrong shape", f"{key} must be {list(shape)}, got {list(values.shape)}")
    largest = float(np.abs(values).max())
    if not largest <= _FLOAT32:
        raise BadRow("not finite", f"{key} holds NaN or infinity")
    if largest > _LARGEST:
        raise BadRow("too large", f"{key} must not exceed {_LARGEST:g} in magnitude, got {largest:g}")
    return values


def check_box(label: Label, height: int, width: int) -> None:
    """Raise BadRow where the box of a label and its image, of that height and width in pixels, do not meet."""
    half = 100.0 * label.scale
    x, y = (float(value) for value in label.center)
    if x + half <= 0 or y + half <= 0 or x - half >= width or y - half >= height:
        box = f"{2 * half:g} pixels around ({x:g}, {y:g})"
        raise BadRow("box misses the image", f"it has {box}, the image {width} x {height}")


def decode_image(text: bytes, strict: bool = False) -> np.ndarray:
    """The image of a cell, upright (EXIF orientation applied): base64 of a JPEG or PNG file -> uint8 RGB [H, W, 3].

    Args:
        text: of the cell.
        strict: refuse also a JPEG that libjpeg-turbo calls corrupt. Else it is read as every viewer and the published
            loaders do: a part may be grey, shifted, or, after a stray byte, as it should be.

    Raises:
        BadRow: broken base64, another kind of file, a truncated one, or more than ``MAX_PIXELS`` pixels; with
            ``strict`` its problem may be ``DAMAGED``.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadRow("broken base64", str(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about limits that this one replaces, and about odd metadata
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
                return _decoded(opened, data, strict)
    except (BadRow, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadRow("broken image", f"neither a JPEG nor a PNG file, {data[:16]!r}") from None
    except Exception as error:  # Pillow raises whatever a damaged file leads to
        raise BadRow("broken image", f"{type(error).__name__}: {error}") from None


def _decoded(opened: Image.Image, data: bytes, strict: bool) -> np.ndarray:
    """The pixels of an opened file."""
    if opened.width * opened.height > MAX_PIXELS:
        raise BadRow("image too large", f"{opened.width} x {opened.height} pixels")
    turn = _TURNS.get(_orientation(opened))
    if opened.format == "JPEG" and opened.mode == "RGB" and turn is None:
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except (ValueError, MemoryError):  # at the least doubt: Pillow knows what can be read, and why not
            pass
    found: Image.Image = opened
    if opened.mode.startswith("I"):  # 16 bits a pixel, which a conversion would cut off at 255
        found = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    found = found if turn is None else found.transpose(turn)
    pixels = np.asarray(found if found.mode == "RGB" else found.convert("RGB"))
    if strict and opened.format == "JPEG":
        _check_undamaged(data)
    return pixels


def _check_undamaged(data: bytes) -> None:
    """Raise BadRow where libjpeg-turbo complains of a JPEG that was read; Pillow keeps that to itself."""
    try:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if str(error).startswith(_COMPLAINTS):
            raise BadRow(DAMAGED, str(error)) from None


def _orientation(opened: Image.Image) -> Any:
    """As the camera was held; 1 where that is not said in a way that can be read."""
    try:
        return opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing about the picture
        return 1


def encode_image(data: bytes) -> bytes:
    """The cell of an image file's bytes."""
    return base64.b64encode(data)


def parse_size(text: bytes) -> tuple[int, int]:
    """Height and width of an `hw` cell: ``[{"height": H, "width": W}]`` or ``H W``.

    Raises:
        BadRow: neither, or not positive.
    """
    try:
        if text.startswith(b"["):
            entry = json.loads(text)[0]
            height, width = int(entry["height"]), int(entry["width"])
        else:
            height, width = (int(number) for number in text.split())
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
        raise BadRow("broken size", f"expected height and width, got {text[:60]!r}") from None
    if height < 1 or width < 1:
        raise BadRow("broken size", f"height and width must be positive, got {height} and {width}")
    return height, width
