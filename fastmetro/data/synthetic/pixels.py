"""From the visible surface of a person to an image: the work per pixel, in parts that can be compiled one by one.

Parts end where the next one reads a pixel together with its neighbours, or many times over: there an image has to be in
memory anyway. As one program they take longer to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.synthetic.appearance import albedo, sample_outfit
from fastmetro.data.synthetic.backgrounds import draw_background, draw_occluders, noise_grids
from fastmetro.data.synthetic.degradation import photograph
from fastmetro.data.synthetic.regions import RegionFields
from fastmetro.data.synthetic.shading import crevices, sample_lights, shade
from fastmetro_kernels.rasterization import RasterOutput, interpolate


def draw_person(
    rng: CounterRandom, region_fields: Tensor, normals: Tensor, faces: Tensor, raster: RasterOutput
) -> Tensor:
    """float32 [B, 3, S, S] in 0..1: the person's colours under light, anything where there is nobody.

    ``region_fields`` [V, C] as ``RegionFields.stack`` gives them; ``normals`` [B, V, 3] of the vertices.
    """
    batch, size = rng.batch_size, raster.face_index.shape[-1]
    attributes = torch.cat([region_fields.expand(batch, -1, -1), normals], dim=-1)
    flat = interpolate(attributes, faces, raster).view(batch, size * size, -1)
    # Each field is read many times: one plane after the other in memory.
    regions = RegionFields(*flat[..., : RegionFields.size()].permute(2, 0, 1).contiguous())
    normals = F.normalize(flat[..., RegionFields.size() :], dim=-1)
    colour, skin = albedo(sample_outfit(rng), regions)
    openness = crevices(raster.depth, raster.face_index >= 0).view(batch, size * size)
    person = shade(colour, normals, skin, openness, sample_lights(rng))
    return person.view(batch, size, size, 3).permute(0, 3, 1, 2).contiguous()


def draw_scene(rng: CounterRandom, person: Tensor, covered: Tensor, background: Tensor, tiles: Tensor | None) -> Tensor:
    """The person, where ``covered`` bool [B, S, S], between the background and what may stand in front: [B, 3, S, S].

    The person's edge is one pixel soft.
    """
    mask = covered.float().unsqueeze(1)
    share = F.avg_pool2d(mask, 3, stride=1, padding=1, count_include_pad=False)
    around = F.avg_pool2d(person * mask, 3, stride=1, padding=1, count_include_pad=False) / share.clamp_min(1e-6)
    image = background + share * (torch.where(mask > 0, person, around) - background)
    return draw_occluders(image, rng, tiles)[0]


class PixelParts(NamedTuple):
    """The functions of these names, or what ``torch.compile`` made of them."""

    draw_person: Callable[[CounterRandom, Tensor, Tensor, Tensor, RasterOutput], Tensor] = draw_person
    noise_grids: Callable[[CounterRandom], list[Tensor]] = noise_grids
    draw_background: Callable[[CounterRandom, list[Tensor], Tensor | None, int], Tensor] = draw_background
    draw_scene: Callable[[CounterRandom, Tensor, Tensor, Tensor, Tensor | None], Tensor] = draw_scene
    photograph: Callable[[Tensor, CounterRandom, Tensor], Tensor] = photograph

    def compiled(self, backend: str | Callable[..., object] = "inductor") -> PixelParts:
        """Each of them compiled on its own."""
        parts: list[Any] = [torch.compile(part, fullgraph=True, backend=backend) for part in self]
        return PixelParts(*parts)
