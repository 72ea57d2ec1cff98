"""Pictures of a training: what the network makes of some images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN
from fastmetro.meshes.mesh import Mesh
from fastmetro.training.sources import Batch
from fastmetro.visualization.cameras import OrthographicCamera
from fastmetro.visualization.overlay import as_picture, overlay
from fastmetro.visualization.render import to_image

SHOWN = 4


@torch.no_grad()
def batch_picture(network: nn.Module, batch: Batch, mesh: Mesh, count: int = SHOWN) -> np.ndarray:
    """Three rows of pictures: the images, the recovered meshes on them and, where there are any, the true ones.

    Meshes are drawn on the batch's device: their shadows take hundreds of small depth maps.

    Args:
        network: in evaluation mode.
        batch: whose first ``count`` images are shown.
        mesh: of the network.
        count: of columns.

    Returns:
        uint8 [rows * S, count * S, 3].

    Raises:
        ValueError: the mesh has no faces.
    """
    if mesh.faces is None:
        raise ValueError(f"mesh {mesh.name!r} has no faces to be drawn")
    faces = mesh.faces
    images, labels = batch.images[:count], batch.labels
    outputs = network(images)
    deviation, mean = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (IMAGE_DEVIATION, IMAGE_MEAN))
    pixels = ((images.float() * deviation + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pixels), axis=1)]
    recovered = outputs["pred_3d_vertices_fine"].float()
    rows.append(_drawn(pixels, recovered, outputs["pred_cam"].float(), faces))
    if bool(labels.has_vertices[:count].any()):
        valid = labels.has_vertices[:count].view(-1, 1, 1)
        true = torch.where(valid, labels.vertices[:count], 0.0)
        rows.append(_drawn(pixels, true, labels.camera[:count], faces, labels.has_vertices[:count].tolist()))
    return np.concatenate(rows, axis=0)


def _drawn(
    pixels: np.ndarray, vertices: Tensor, cameras: Tensor, faces: np.ndarray, there: list[bool] | None = None
) -> np.ndarray:
    pictures = []
    for number, image in enumerate(pixels):
        if (there is None or there[number]) and bool((vertices[number].isfinite()).all()):
            camera = OrthographicCamera.from_weak_perspective(cameras[number], side=image.shape[0])
            picture = overlay(image, vertices[number], faces, camera)
        else:
            picture = to_image(as_picture(image))
        pictures.append(np.asarray(picture))
    return np.concatenate(pictures, axis=1)
