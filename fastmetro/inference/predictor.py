"""Image in, mesh out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastmetro.inference.images import crop_window, cut_crop, load_image, to_input
from fastmetro.inference.prediction import Prediction
from fastmetro.inference.pretrained import load_pretrained, trained_size
from fastmetro.models import FastMETRO


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Predictor:
    """Recovers a mesh from a photograph.

    Args:
        checkpoint: ``"fastmetro-compact"`` for the weights that ship with the package (trained on synthetic images
            only: expect a domain gap on photographs), or a checkpoint file: one of ours, which names its own
            architecture, or a released one together with ``model``.
        model: The network to load a released checkpoint into; None builds what the checkpoint names.
        attention: Backend of the decoder's self-attention, as in :func:`fastmetro.create_model`.
        device: Where to run; the first GPU by default.

    Attributes:
        crop_size: side of the crops in pixels, that of the images which the network was trained on; 224 (paper,
            Section 4.1) where the checkpoint does not say.

    Raises:
        FileNotFoundError: the checkpoint is neither a file nor a known name.
        ValueError: the checkpoint does not fit the network, with the differences, or names no size of images.
    """

    def __init__(
        self,
        checkpoint: str | Path = "fastmetro-compact",
        *,
        model: FastMETRO | None = None,
        attention: str = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        self.crop_size = trained_size(checkpoint)
        self.device = torch.device(device) if device is not None else default_device()
        self.model = load_pretrained(checkpoint, model=model, attention=attention).to(self.device).eval()
        self.mesh = self.model.mesh
        if self.mesh.faces is None:
            raise ValueError(f"mesh {self.mesh.name!r} has no faces: load it with its model file to get them")

    def __call__(
        self, image: str | Path | np.ndarray, box: tuple[float, float, float, float] | None = None
    ) -> Prediction:
        """Recover the mesh of one person.

        Args:
            image: A file, or uint8 RGB pixels [H, W, 3].
            box: Person box (left, top, right, bottom) in pixels; None takes the largest centred square.

        Raises:
            FileNotFoundError, ValueError: see :func:`fastmetro.inference.images.load_image` and ``crop_window``.
        """
        pixels = image if isinstance(image, np.ndarray) else load_image(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"image must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        window = crop_window(pixels.shape[0], pixels.shape[1], box)
        output = self.forward([cut_crop(pixels, window, self.crop_size)])
        return Prediction(
            vertices=output["pred_3d_vertices_fine"][0].float().cpu().numpy(),
            joints=output["pred_3d_joints"][0].float().cpu().numpy(),
            camera=output["pred_cam"][0].float().cpu().numpy(),
            window=window,
            image_size=(pixels.shape[0], pixels.shape[1]),
            faces=np.asarray(self.mesh.faces),
            joint_names=tuple(self.mesh.joint_names),
        )

    @torch.inference_mode()
    def forward(self, crops: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The network's outputs for crops, uint8 [crop_size, crop_size, 3] each."""
        for crop in crops:
            if crop.shape != (self.crop_size, self.crop_size, 3):
                raise ValueError(f"a crop must be {[self.crop_size, self.crop_size, 3]}, got {list(crop.shape)}")
        return self.model(torch.stack([to_input(crop) for crop in crops]).to(self.device))
