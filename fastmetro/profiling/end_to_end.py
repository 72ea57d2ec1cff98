"""From an image file to saved vertices, one image at a time, stage by stage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmetro.inference.images import crop_window, cut_crop, load_image, to_input
from fastmetro.inference.prediction import Prediction
from fastmetro.meshes.mesh import Mesh
from fastmetro.profiling.contenders import Contender, Outputs
from fastmetro.profiling.latency import milliseconds, tensor_float_32

STAGES = ("decode", "crop", "copy in", "network", "copy out", "save")
_MAX_ROUNDS = 200
Times = dict[str, float]
Result = TypeVar("Result")


class FileToFile:
    """The way from a file to a file for one network, as `fastmetro.Predictor` goes it.

    Args:
        image: the file; its central square is taken.
        mesh: gives faces and joint names to the saved file.
        device: of the network.
        folder: for the saved files.

    Raises:
        ValueError: the mesh has no faces.
    """

    def __init__(self, image: Path, mesh: Mesh, device: torch.device, folder: Path) -> None:
        if mesh.faces is None:
            raise ValueError(f"mesh {mesh.name!r} has no faces to save; load it with its model file")
        self._image, self._mesh, self._device, self._folder = image, mesh, device, folder
        self._faces = np.asarray(mesh.faces)

    @torch.no_grad()
    def run(self, contender: Contender) -> Times:
        """Milliseconds of each of :data:`STAGES`, the device waited for after each."""
        times: Times = {}

        def timed(stage: str, call: Callable[[], Result]) -> Result:
            results: list[Result] = []
            times[stage] = milliseconds(lambda: results.append(call()), self._device)
            return results[0]

        pixels = timed("decode", lambda: load_image(self._image))
        window = crop_window(pixels.shape[0], pixels.shape[1], None)
        crop = timed("crop", lambda: cut_crop(pixels, window))
        images = timed("copy in", lambda: self._to_device(crop, contender.takes_pixels))
        out = timed("network", lambda: contender.run(images))
        arrays = timed("copy out", lambda: _to_host(out))
        prediction = Prediction(
            *arrays, window, (pixels.shape[0], pixels.shape[1]), self._faces, tuple(self._mesh.joint_names)
        )
        timed("save", lambda: prediction.save(self._folder / f"{contender.name}.npz"))
        return times

    def _to_device(self, crop: np.ndarray, as_pixels: bool) -> Tensor:
        if as_pixels:
            return torch.from_numpy(np.array(crop)).unsqueeze(0).to(self._device)
        return to_input(crop).unsqueeze(0).to(self._device)


def _to_host(out: Outputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, joints and camera of the first image."""
    vertices, joints, camera = (
        out[key][0].float().cpu().numpy() for key in ("pred_3d_vertices_fine", "pred_3d_joints", "pred_cam")
    )
    return vertices, joints, camera


def time_file_to_file(
    contenders: Sequence[Contender], image: Path, mesh: Mesh, device: torch.device, seconds: float, rounds: int
) -> list[list[Times]]:
    """Stage times by contender and round; the contenders take turns, image by image.

    Args:
        contenders: warm for a batch of one.
        image, mesh, device: see :class:`FileToFile`.
        seconds: time for each contender.
        rounds: at least so many, also if that takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        way = FileToFile(image, mesh, device, Path(folder))
        taken: list[list[Times]] = [[] for _ in contenders]
        spent = 0.0
        while len(taken[0]) < rounds or (spent < 1e3 * seconds * len(contenders) and len(taken[0]) < _MAX_ROUNDS):
            for contender, mine in zip(contenders, taken, strict=True):
                with tensor_float_32(contender.uses_tf32):
                    if not mine:
                        way.run(contender)
                    mine.append(way.run(contender))
                spent += sum(mine[-1].values())
    return taken
