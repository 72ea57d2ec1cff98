"""What the engine reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """Work that the engine does once, when it is built, instead of once per image.

    Attributes:
        name: short name, unique within an engine.
        description: one sentence for the report.
        flops_saved: floating point operations per image that are no longer done; a multiplication and an addition
            count as two.
    """

    name: str
    description: str
    flops_saved: int
