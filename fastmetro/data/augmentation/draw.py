"""What is drawn at random for a sample: the distributions of the published loaders (protocol, 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastmetro.data.counter_random import CounterRandom
from fastmetro.data.tsv.rows import Kind

NOISE = 0.4
SCALE_DEVIATION = 0.25
ROTATION_DEVIATION: dict[Kind, float] = {"body": 30.0, "hand": 90.0}
"""Degrees; rotations end at twice as much."""
UPRIGHT = 0.6
FLIP: dict[Kind, float] = {"body": 0.5, "hand": 0.0}
"""Probability. A flipped right hand would be a left one, for which MANO's right hand has no parameters."""


@dataclass(frozen=True)
class Draw:
    """How a sample is varied; as it is made without arguments, not at all.

    Attributes:
        flip: mirrored left to right, after the rotation.
        noise: factors of red, green and blue; the products are clipped to 0..255.
        rotation: degrees, counter-clockwise as seen in the image, around the middle of the box.
        scale: factor of the side of the box; above 1 the person becomes smaller.

    Raises:
        ValueError: a factor that is not positive (noise: negative), or a number that is not finite.
    """

    flip: bool = False
    noise: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rotation: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.rotation):
            raise ValueError(f"rotation must be finite, got {self.rotation}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        if len(self.noise) != 3 or not all(math.isfinite(factor) and factor >= 0 for factor in self.noise):
            raise ValueError(f"noise must be three finite factors of at least 0, got {self.noise}")


def draw_samples(seed: int, numbers: Sequence[int], kind: Kind) -> list[Draw]:
    """The draws of samples, each a pure function of (seed, its number): the same in any worker, batch and order.

    Body: flipped with probability 1/2, rotated with probability 2/5 by a normal of 30 degrees, clipped to 60, scaled by
    a normal around 1 of 0.25, clipped to 0.75..1.25, and each colour multiplied by a uniform of 0.6..1.4. Hand: never
    flipped, rotations of 90 degrees, clipped to 180.

    Raises:
        ValueError: the seed is out of range, see :class:`CounterRandom`, or a number is negative.
    """
    if min(numbers, default=0) < 0:
        raise ValueError(f"numbers must not be negative, got {min(numbers)}")
    random = CounterRandom(seed, torch.tensor(list(numbers), dtype=torch.int64))
    deviation = ROTATION_DEVIATION[kind]
    rotation = (random.normal("rotation") * deviation).clamp(-2 * deviation, 2 * deviation)
    rotation = rotation.masked_fill(random.chance("upright", UPRIGHT), 0.0)
    scale = (1 + random.normal("scale") * SCALE_DEVIATION).clamp(1 - SCALE_DEVIATION, 1 + SCALE_DEVIATION)
    noise = random.uniform("noise", 3, low=1 - NOISE, high=1 + NOISE)
    columns = (random.chance("flip", FLIP[kind]), noise, rotation, scale)
    return [
        Draw(flip, (red, green, blue), angle, factor)
        for flip, (red, green, blue), angle, factor in zip(*(column.tolist() for column in columns), strict=True)
    ]
