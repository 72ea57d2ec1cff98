"""Scenes and helpers of the rasteriser's tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmetro_kernels import BackendUnavailable, RasterOutput, rasterize

BACKENDS = ["reference", "native"]


def run(vertices: Tensor, faces: Tensor, height: int, width: int, backend: str, **options: bool) -> RasterOutput:
    try:
        return rasterize(vertices, faces, height, width, backend=backend, **options)
    except BackendUnavailable as error:
        if vertices.device.type == "cpu":
            raise
        pytest.skip(str(error))


def tensor(values: object, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def random_scene(
    seed: int,
    device: torch.device | str,
    batch: int = 2,
    triangles: int = 60,
    size: tuple[int, int] = (37, 53),
    extent: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """Triangle soup that reaches outside the image, with some coordinates exactly on pixel centres and edges."""
    generator = torch.Generator().manual_seed(seed)
    count = triangles * 3
    height, width = size
    centre = torch.rand(batch, triangles, 2, generator=generator) * torch.tensor([width + 10.0, height + 10.0]) - 5
    centre = centre.repeat_interleave(3, 1)
    xy = centre + (torch.rand(batch, count, 2, generator=generator) - 0.5) * extent
    snapped = torch.rand(batch, count, 1, generator=generator) < 0.3
    xy = torch.where(snapped, (xy * 2).round() / 2, xy)
    z = torch.rand(batch, count, 1, generator=generator) * 3 + 0.05
    z = torch.where(torch.rand(batch, count, 1, generator=generator) < 0.03, -z, z)
    faces = torch.arange(count).view(triangles, 3)
    return torch.cat([xy, z], 2).to(device), faces.to(device)


def assert_same(actual: RasterOutput, expected: RasterOutput) -> None:
    assert torch.equal(actual.face_index, expected.face_index)
    assert torch.equal(actual.depth, expected.depth)
    assert torch.equal(actual.barycentrics, expected.barycentrics)
