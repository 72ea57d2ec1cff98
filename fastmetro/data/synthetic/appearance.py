"""Skin, hair and clothes: random outfits, and their colours at any point of the body."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.synthetic.backgrounds import random_colours
from fastmetro.data.synthetic.regions import RegionFields

_SKINS = (
    (0.96, 0.80, 0.70),
    (0.90, 0.70, 0.57),
    (0.80, 0.58, 0.44),
    (0.62, 0.42, 0.30),
    (0.42, 0.27, 0.19),
    (0.26, 0.17, 0.13),
)
_HAIRS = (
    (0.05, 0.04, 0.04),
    (0.16, 0.10, 0.07),
    (0.33, 0.20, 0.11),
    (0.62, 0.46, 0.25),
    (0.55, 0.55, 0.55),
    (0.45, 0.17, 0.08),
)
_GARMENTS = ("shirt", "trousers", "shoes")
_WAVES = 4


class Garment(NamedTuple):
    """Colours [B, 1, 3] and pattern of one piece of clothing; the pattern's waves are [B, 1, 3] in 1/m."""

    colour: Tensor
    second: Tensor
    kind: Tensor
    wave_a: Tensor
    wave_b: Tensor


@dataclass(frozen=True)
class Outfit:
    """One person's looks; every tensor is [B, 1] unless said otherwise. Thresholds refer to ``RegionFields``."""

    skin: Tensor
    hair: Tensor
    hairline: Tensor
    sleeve: Tensor
    neckline: Tensor
    waist: Tensor
    trouser_length: Tensor
    shoe_height: Tensor
    looseness: Tensor
    hair_volume: Tensor
    wrinkles: Tensor
    wrinkle_waves: Tensor
    garments: tuple[Garment, ...]


def _from_palette(rng: CounterRandom, name: str, palette: tuple[tuple[float, float, float], ...]) -> Tensor:
    """[B, 1, 3]: a colour between two neighbours of the palette, with jitter."""
    place = rng.uniform(f"{name}/place", 1, 1) * (len(palette) - 1)
    colour = torch.zeros(rng.batch_size, 1, 3, device=rng.device)
    for number, entry in enumerate(palette):
        weight = (1 - (place - number).abs()).clamp_min(0)
        colour = colour + torch.cat([weight * channel for channel in entry], dim=-1)
    return (colour * (1 + 0.05 * rng.normal(f"{name}/jitter", 1, 3))).clamp(0, 1)


def _wave(rng: CounterRandom, name: str, low: float, high: float, count: int = 1) -> Tensor:
    """[B, count, 3] wave vectors of random direction, their lengths log-uniform between ``low`` and ``high``."""
    direction = rng.normal(f"{name}/direction", count, 3)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    return direction * torch.exp(rng.uniform(f"{name}/length", count, 1, low=math.log(low), high=math.log(high)))


def _garment(rng: CounterRandom, name: str) -> Garment:
    colours = random_colours(rng, f"{name}/colours", 2).flatten(2)
    upright = rng.choice(f"{name}/upright", (0.4, 0.3, 0.3)).view(-1, 1, 1)
    wave = _wave(rng, f"{name}/wave", 25.0, 250.0)
    length = wave.norm(dim=-1, keepdim=True)
    zero = torch.zeros_like(length)
    across, along = torch.cat([zero, length, zero], -1), torch.cat([length, zero, zero], -1)
    wave = torch.where(upright == 0, across, torch.where(upright == 1, along, wave))
    return Garment(
        colour=colours[:, :1],
        second=colours[:, 1:],
        kind=rng.choice(f"{name}/kind", (0.5, 0.2, 0.15, 0.15)).view(-1, 1),
        wave_a=wave,
        wave_b=torch.stack([-wave[..., 1], wave[..., 0], wave[..., 2]], dim=-1),
    )


def sample_outfit(rng: CounterRandom) -> Outfit:
    """Draw what a person wears: sleeves of any length or none, shorts to long trousers, shoes or bare feet."""
    hairline = torch.where(
        rng.chance("hair/bald", 0.1, 1), torch.full_like(rng.uniform("hair/line", 1), 9.0),
        rng.uniform("hair/line", 1, low=-0.15, high=0.45),
    )  # fmt: skip
    sleeve_kind = rng.choice("shirt/kind", (0.06, 0.06, 0.44, 0.44)).view(-1, 1)
    draw = rng.uniform("shirt/sleeve", 1)
    short, long = 0.15 + 0.4 * draw, 0.8 + 0.2 * draw
    sleeve = torch.where(
        sleeve_kind == 0, -9.0, torch.where(sleeve_kind == 1, 0.02, torch.where(sleeve_kind == 2, short, long))
    )
    draw = rng.uniform("trousers/length", 1)
    long_legs = rng.chance("trousers/long", 0.65, 1)
    barefoot = rng.chance("shoes/bare", 0.15, 1)
    shirt, trousers, shoes = (_garment(rng, name) for name in _GARMENTS)
    one_piece = rng.chance("trousers/as_shirt", 0.12, 1)
    trousers = Garment(
        *(
            torch.where(one_piece.view(-1, *[1] * (ours.ndim - 1)), theirs, ours)
            for ours, theirs in zip(trousers, shirt, strict=True)
        )
    )
    return Outfit(
        skin=_from_palette(rng, "skin", _SKINS),
        hair=_from_palette(rng, "hair", _HAIRS),
        hairline=hairline,
        sleeve=sleeve,
        neckline=rng.uniform("shirt/neckline", 1, low=0.15, high=0.75),
        waist=rng.uniform("trousers/waist", 1, low=-0.05, high=0.35),
        trouser_length=torch.where(long_legs, 0.85 + 0.17 * draw, 0.15 + 0.5 * draw),
        shoe_height=torch.where(
            barefoot, torch.full_like(draw, 9.0), rng.uniform("shoes/height", 1, low=0.75, high=1.0)
        ),
        looseness=0.025 * rng.uniform("shirt/looseness", 1) ** 2,
        hair_volume=0.05 * rng.uniform("hair/volume", 1) ** 1.5,
        wrinkles=0.25 * rng.uniform("shirt/wrinkles", 1),
        wrinkle_waves=_wave(rng, "shirt/wrinkle", 8.0, 80.0, _WAVES),
        garments=(shirt, trousers, shoes),
    )


def _below(value: Tensor, limit: Tensor, softness: float) -> Tensor:
    return ((limit - value) / softness + 0.5).clamp(0, 1)


def coverage(outfit: Outfit, at: RegionFields) -> dict[str, Tensor]:
    """How much of hair, shirt, trousers, shoes, eyes and mouth covers each point: [B, N] in 0..1 each."""
    body = _below(at.neck, outfit.neckline, 0.1)
    shirt = body * _below(at.arm, outfit.sleeve, 0.02) * _below(outfit.waist, at.torso, 0.01)
    # Thighs reach above the waistline of the torso's scale only where legs begin, so legs are cut by length alone.
    trousers = body * _below(at.leg, outfit.trouser_length, 0.02) * _below(at.torso, outfit.waist, 0.01)
    trousers = trousers * _below(at.arm, torch.zeros_like(outfit.waist), 0.1)
    shoes = torch.maximum(
        _below(outfit.shoe_height, at.leg, 0.02), _below(0.5 * torch.ones_like(at.foot), at.foot, 0.1)
    )
    shoes = shoes * (outfit.shoe_height < 2)
    hair = _below(0.5 * torch.ones_like(at.head), at.head, 0.2) * _below(outfit.hairline, at.scalp, 0.1)
    bare_face = (1 - hair) * (at.head > 0.5)
    eyes = bare_face * _below(at.eyes, torch.full_like(outfit.waist, 0.011), 0.005)
    mouth = bare_face * _below(at.mouth, torch.full_like(outfit.waist, 0.011), 0.005)
    return {"shirt": shirt, "trousers": trousers, "shoes": shoes, "hair": hair, "eyes": eyes, "mouth": mouth}


def _phase(at: RegionFields, wave: Tensor) -> Tensor:
    return at.x * wave[..., 0] + at.y * wave[..., 1] + at.z * wave[..., 2]


def _paint(garment: Garment, at: RegionFields) -> Tensor:
    """[B, N, 3]: plain, stripes, checks or blotches."""
    a, b = _phase(at, garment.wave_a).sin(), _phase(at, garment.wave_b).sin()
    stripes, checks = (4 * a).clamp(-1, 1), (6 * a * b).clamp(-1, 1)
    blotches = (2 * (a + _phase(at, 1.7 * garment.wave_b - 0.6 * garment.wave_a).sin())).clamp(-1, 1)
    kind = garment.kind
    mix = torch.where(kind == 1, stripes, torch.where(kind == 2, checks, blotches))
    mix = torch.where(kind == 0, torch.zeros_like(mix), 0.5 * mix + 0.5).unsqueeze(-1)
    return garment.colour + mix * (garment.second - garment.colour)


def wrinkle_field(outfit: Outfit, at: RegionFields) -> Tensor:
    """Smooth noise of about unit variance over the body, [B, N]."""
    total = torch.zeros_like(at.x)
    for number in range(_WAVES):
        total = total + (_phase(at, outfit.wrinkle_waves[:, number : number + 1]) + number).sin()
    return total * (2 / _WAVES) ** 0.5


def albedo(outfit: Outfit, at: RegionFields) -> tuple[Tensor, Tensor]:
    """Colours [B, N, 3] in 0..1, and how much of each point is bare skin, [B, N]."""
    covers = coverage(outfit, at)
    colour = outfit.skin.expand(-1, at.x.shape[-1], -1)
    skin = torch.ones_like(covers["hair"])
    creases = 1 + (outfit.wrinkles * wrinkle_field(outfit, at)).clamp(-0.5, 0.5).unsqueeze(-1)
    for name, garment in zip(
        ("trousers", "shirt", "shoes"), (outfit.garments[1], outfit.garments[0], outfit.garments[2]), strict=True
    ):
        cover = covers[name].unsqueeze(-1)
        colour = colour + cover * (_paint(garment, at) * creases - colour)
        skin = skin * (1 - covers[name])
    for name, paint in (("hair", outfit.hair * creases), ("eyes", 0.25 * outfit.hair), ("mouth", outfit.skin * 0.65)):
        colour = colour + covers[name].unsqueeze(-1) * (paint - colour)
    return colour.clamp(0, 1), skin * (1 - covers["hair"])


def clothing_thickness(outfit: Outfit, at: RegionFields) -> Tensor:
    """How far cloth and hair stand off the skin along the normal, in metres: [B, V]."""
    covers = coverage(outfit, at)
    folds = (1 + 0.5 * wrinkle_field(outfit, at)).clamp_min(0.0)
    cloth = torch.maximum(covers["shirt"], covers["trousers"])
    return cloth * (0.002 + outfit.looseness * folds) + covers["hair"] * outfit.hair_volume + 0.006 * covers["shoes"]
