"""How the positions of a first convolution's result are shared out among programs. Nothing needs Triton."""

from __future__ import annotations

from typing import NamedTuple

PATCH = 32
"""Numbers of a row of a window that a product takes: columns times channels, filled up with zeros."""
LARGEST_KERNEL = 7
OUTPUTS = (16, 32, 64)
"""Channels of the result that the kernel is made for."""


class ImageWeightGradientConfig(NamedTuple):
    """Tile of one program: positions at a time (a power of two from 32 to 256), warps (4 or 8), and programs.

    The same number of programs everywhere, so that sums are taken in the same order on every device.
    """

    positions: int
    warps: int
    programs: int = 264


PINNED = ImageWeightGradientConfig(64, 4)
CONFIGS = (
    PINNED, ImageWeightGradientConfig(32, 8, 396), ImageWeightGradientConfig(64, 8),
    ImageWeightGradientConfig(64, 8, 132), ImageWeightGradientConfig(128, 8),
)  # fmt: skip
"""What `python -m bench image_weight_gradient --all-configs` times."""
_ACCEPTED = {"positions": (32, 64, 128, 256), "warps": (4, 8)}


def shares(positions: int, config: ImageWeightGradientConfig) -> tuple[int, int]:
    """Programs for so many positions, and positions of each but the last, a multiple of the tile's."""
    tiles = -(-positions // config.positions)
    each = -(-tiles // max(min(config.programs, tiles), 1))
    return -(-tiles // max(each, 1)), each * config.positions


def problem(config: ImageWeightGradientConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, accepted in _ACCEPTED.items():
        if (value := getattr(config, name)) not in accepted:
            return f"{name} must be one of {', '.join(map(str, accepted))}, got {value}"
    return None if config.programs >= 1 else f"programs must be at least 1, got {config.programs}"


def unfit(outputs: int, channels: int, kernel: int) -> str | None:
    """Why the kernel does not take a convolution with so many channels and such a square window, or None."""
    if outputs not in OUTPUTS:
        return f"grad must have {', '.join(map(str, OUTPUTS))} channels, got {outputs}"
    if kernel > LARGEST_KERNEL or kernel * channels > PATCH:
        return f"kernel must be at most {LARGEST_KERNEL}, and {PATCH} with x's channels, got {kernel} and {channels}"
    return None
