"""The demo: a photograph and two unseen synthetic people, their meshes as pictures and files, and the time it takes."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmetro.data.synthetic.dataset import SyntheticPeople
from fastmetro.evaluation.synthetic import HELD_OUT_SEED, mesh_errors
from fastmetro.files import replacing
from fastmetro.inference.batch import save_results
from fastmetro.inference.prediction import Prediction
from fastmetro.inference.predictor import Predictor
from fastmetro.visualization.figures import overlay_picture, side_picture
from fastmetro.visualization.overlay import contact_sheet

HELD_OUT = (6, 10)
"""Indices of the two synthetic people: a whole figure in good light, and a dark one in poor light."""
PATHS = {"plain (dense PyTorch)": "dense", "fused (sparse kernels)": "auto"}


def demo_images(people: SyntheticPeople) -> dict[str, np.ndarray]:
    """Name -> uint8 RGB pixels: two held-out renders, and NASA's portrait of Eileen Collins (public domain)."""
    import skimage.data

    renders = people(torch.tensor(HELD_OUT)).images.permute(0, 2, 3, 1).numpy()
    images = {f"synthetic-{index}": pixels for index, pixels in zip(HELD_OUT, renders, strict=True)}
    return images | {"astronaut": np.asarray(skimage.data.astronaut())}


def demo_errors(people: SyntheticPeople, predictions: dict[str, Prediction]) -> dict[str, float]:
    """PA-MPJPE in mm of the synthetic people among ``predictions``."""
    names = [f"synthetic-{index}" for index in HELD_OUT]
    predicted = torch.stack([torch.from_numpy(predictions[name].vertices) for name in names])
    truth = people.labels(torch.tensor(HELD_OUT)).vertices
    errors = mesh_errors(predicted, truth, people.joint_regressor, people.root_joints)["pa_mpjpe"]
    return dict(zip(names, errors.tolist(), strict=True))


def median_milliseconds(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 4.0
) -> list[float]:
    """Median wall-clock time of each call with the device synchronised.

    The calls take turns for about ``seconds``, after a warm-up, so that whatever else the machine does meets all alike.
    """
    for call in calls:
        for _ in range(3):
            call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for call, mine in zip(calls, times, strict=True):
            mine.append(_milliseconds(call, device))
    return [statistics.median(mine) for mine in times]


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def run_demo(out: Path, device: str | None = None) -> None:
    """Predict the demo images, save pictures and meshes to ``out``, print what was written and the time per image.

    Raises:
        OSError: the results cannot be written.
    """
    predictor = Predictor(device=device)
    people = SyntheticPeople(predictor.mesh, HELD_OUT_SEED)
    images = demo_images(people)
    predictions = {name: predictor(pixels) for name, pixels in images.items()}
    errors = demo_errors(people, predictions)
    cells: list[Image.Image] = []
    captions: list[str] = []
    for name, pixels in images.items():
        save_results(predictions[name], pixels, out, name)
        row = [Image.fromarray(pixels), overlay_picture(predictions[name], pixels), side_picture(predictions[name])]
        cells += [picture.resize((360, 360), Image.Resampling.LANCZOS) for picture in row]
        error = f"PA-MPJPE {errors[name]:.0f} mm" if name in errors else "never seen a photograph"
        captions += [name, error, "from the side"]
    sheet = out / "demo.png"
    with replacing(sheet) as temporary:
        contact_sheet(cells, captions, columns=3).save(temporary, format="PNG")
    print(f"{len(images)} images: pictures, .glb and .npz in {out}, all at a glance in {sheet}")
    print("The weights were trained on synthetic people only: expect visible errors on the photograph.")
    print_times(images["astronaut"], predictor.device)


def print_times(pixels: np.ndarray, device: torch.device) -> None:
    """Time one image, pixels to vertices, on the plain and on the fused path."""
    print(f"time per image, pixels to vertices, batch 1, float32, {_device_name(device)}:")
    predictors = [Predictor(attention=attention, device=device) for attention in PATHS.values()]
    calls = [functools.partial(predictor, pixels) for predictor in predictors]
    for title, milliseconds in zip(PATHS, median_milliseconds(calls, device), strict=True):
        print(f"  {title:24} {milliseconds:8.2f} ms")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
