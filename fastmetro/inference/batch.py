"""Many image files in, their results out; one bad file does not stop the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastmetro.inference.images import IMAGE_SUFFIXES, load_image
from fastmetro.inference.prediction import Prediction
from fastmetro.inference.predictor import Predictor
from fastmetro.visualization.figures import save_pictures

RESULT_SUFFIXES = (".glb", ".npz")


def collect_images(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``; a folder stands for the images directly inside it, sorted by name.

    A file need not exist: :func:`predict_files` reports it with the others that cannot be read.

    Raises:
        ValueError: there is no path.
        FileNotFoundError: a folder holds no image.
    """
    if not paths:
        raise ValueError("no image was given")
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"folder {str(path)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    return found


def result_names(paths: Sequence[Path]) -> list[str]:
    """A distinct name for each image: its stem, with a number where two images share one."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        names.append(name)
    return names


def save_results(prediction: Prediction, image: np.ndarray, out: Path, name: str) -> list[Path]:
    """Write ``NAME_overlay.png``, ``NAME_side.png``, ``NAME.glb`` and ``NAME.npz`` to ``out``; returns the paths.

    ``image`` is what the predictor saw, uint8 RGB [H, W, 3].
    """
    written = save_pictures(prediction, image, out, name)
    return written + [prediction.save(out / f"{name}{suffix}") for suffix in RESULT_SUFFIXES]


def predict_files(
    predictor: Predictor,
    images: Sequence[Path],
    out: Path,
    box: tuple[float, float, float, float] | None = None,
) -> dict[Path, str]:
    """Predict every image and save its results.

    Args:
        predictor: The network.
        images: Image files.
        out: Folder for the results; made when missing.
        box: Person box for all of them; None takes the central squares.

    Returns:
        For each image that failed, why.

    Raises:
        OSError: the results cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    failures: dict[Path, str] = {}
    progress = tqdm(list(zip(images, result_names(images), strict=True)), unit="image", disable=len(images) < 2)
    for path, name in progress:
        try:
            pixels = load_image(path)
            prediction = predictor(pixels, box)
        except (FileNotFoundError, ValueError) as error:
            failures[path] = str(error)
            continue
        save_results(prediction, pixels, out, name)
    return failures
