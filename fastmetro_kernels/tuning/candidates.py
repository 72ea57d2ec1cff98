"""What is tried for a pass: configurations of Triton and of the CUDA kernels, and plain PyTorch as a yardstick.

Tiles that spill registers when compiled for compute capability 9.0 were left out (`tests/kernels/compile_attention.py`
prints what each needs), as were tiles far from what any probe found fast.
"""

from __future__ import annotations

from fastmetro_kernels.attention.configs import CONFIGS, KERNELS, WHOLE, Config, TritonConfig
from fastmetro_kernels.tuning.table import Candidate, Configuration

LARGEST_SDPA = 1 << 27
"""Scores of masked SDPA (batch * heads * tokens^2), beyond which it is not timed: it lost by far long before."""

STEPS_PER_SEGMENT = (0, 1, 2, 4, 8, 16)

# (kernel, padded head dim) -> tiles for half precision, beside the pinned one.
_HALF: dict[tuple[str, int], tuple[str, ...]] = {
    ("forward", 16): ("16x64x1x2", "16x64x2x2", "16x64x1x3", "32x64x1x2", "32x64x2x2", "64x64x4x2", "64x128x4x2"),
    ("forward", 32): ("16x64x1x2", "16x64x2x2", "32x64x2x2", "32x128x2x2", "64x64x4x2", "64x128x4x2"),
    ("forward", 64): ("16x64x2x2", "16x64x4x2", "32x64x2x2", "32x64x4x2", "32x128x4x2", "64x64x4x2", "64x128x4x2",
                      "64x128x4x1", "64x128x8x2"),
    ("forward", 128): ("16x64x2x2", "16x64x4x2", "32x64x4x2", "64x64x4x2", "64x64x8x2", "64x128x8x2"),
    ("rows", 16): ("16x64x1x2", "16x64x2x2", "32x64x1x2", "32x64x2x2", "64x64x4x2", "64x128x4x2"),
    ("rows", 32): ("16x64x1x2", "16x64x2x2", "32x64x2x2", "32x64x4x2", "64x64x4x2", "64x128x4x2"),
    ("rows", 64): ("16x64x2x2", "16x64x4x2", "32x64x4x2", "32x128x4x2", "64x64x4x2", "64x128x4x2"),
    ("rows", 128): ("16x64x2x2", "16x64x4x2", "32x64x4x2", "64x64x4x2", "64x64x8x2"),
    ("columns", 16): ("16x64x1x2", "16x64x2x2", "32x64x2x2", "32x64x4x2", "64x64x4x2"),
    ("columns", 32): ("16x64x1x2", "16x64x2x2", "32x64x2x2", "32x64x4x2", "64x64x4x2"),
    ("columns", 64): ("16x64x2x2", "16x64x4x2", "32x64x4x2", "32x128x4x2", "32x128x8x2", "64x64x4x2", "64x64x8x2"),
    ("columns", 128): ("16x64x4x2", "32x64x4x2", "32x64x8x2"),
}  # fmt: skip
_FLOAT = ("16x16x4x1", "16x32x4x1", "16x64x4x1", "16x64x2x1", "32x32x4x1")
_PRECISIONS = {2: ("ieee",), 4: ("ieee", "tf32x3")}


def tiles(kernel: str, element_size: int, dim: int) -> list[Config]:
    """Tiles to try for one kernel, the pinned one first."""
    named = _HALF[kernel, dim] if element_size == 2 else _FLOAT
    pinned = CONFIGS[kernel, element_size][dim]
    return list(dict.fromkeys([pinned, *(Config(*map(int, text.split("x"))) for text in named)]))


def first_round(pass_name: str, element_size: int, dim: int) -> list[tuple[str, Configuration]]:
    """Backends and configurations to try first.

    The kernels of the backward run one after the other, so their tiles are varied one kernel at a time.
    """
    pinned = [CONFIGS[kernel, element_size][dim] for kernel in KERNELS[pass_name]]
    found: list[TritonConfig] = []
    for precision in _PRECISIONS[element_size]:
        for index, kernel in enumerate(KERNELS[pass_name]):
            for tile in tiles(kernel, element_size, dim):
                found.append(TritonConfig((*pinned[:index], tile, *pinned[index + 1 :]), precision))
    tried: list[tuple[str, Configuration]] = [("triton", one) for one in dict.fromkeys(found)]
    if element_size == 2:
        tried += [("native", steps) for steps in STEPS_PER_SEGMENT]
    return tried


def second_round(measured: list[Candidate], pass_name: str, element_size: int, dim: int) -> list[TritonConfig]:
    """What the first round suggests: the best tile of every kernel together, with hub rows split in other ways."""
    triton = sorted(
        (one for one in measured if isinstance(one.configuration, TritonConfig)), key=lambda one: one.milliseconds
    )
    if not triton:
        return []
    configs = [one.configuration for one in triton if isinstance(one.configuration, TritonConfig)]
    pinned = tuple(CONFIGS[kernel, element_size][dim] for kernel in KERNELS[pass_name])
    best = []
    for index in range(len(pinned)):
        others = [c for c in configs if c.tiles[:index] + c.tiles[index + 1 :] == pinned[:index] + pinned[index + 1 :]]
        best.append((others or configs)[0].tiles[index])
    widest = max(tile.keys for tile in best)
    whole = [TritonConfig(tuple(best), configs[0].precision, share) for share in (0, WHOLE, widest, 4 * widest)]
    return [one for one in whole if one not in configs]
