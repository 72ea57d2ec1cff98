"""What an engine folded, and how far it is from the network that it was made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fold:
    """One step that was folded.

    Attributes:
        name: short and stable, unique within an engine.
        description: what became of what, and why the result is the same.
        flops_saved: per image, 2 for each multiply-add; 0 where only launches or memory traffic are saved.
    """

    name: str
    description: str
    flops_saved: int


@dataclass(frozen=True)
class EngineReport:
    """What was folded, and the error that was measured while compiling.

    Attributes:
        device, dtype: of the weights and activations.
        folds: every step, in the order in which they were applied.
        largest_difference: largest absolute difference, over all coordinates of all outputs in metres, to the network
            in float32, for random images.
        graphs: whether calls replay CUDA graphs.
    """

    device: torch.device
    dtype: torch.dtype
    folds: tuple[Fold, ...]
    largest_difference: float
    graphs: bool

    @property
    def flops_saved(self) -> int:
        """Of all folds, per image."""
        return sum(fold.flops_saved for fold in self.folds)

    def __str__(self) -> str:
        width = max(len(fold.name) for fold in self.folds)
        lines = [
            f"engine on {self.device}, {str(self.dtype).removeprefix('torch.')}, "
            f"{'CUDA graphs' if self.graphs else 'no graphs'}",
            f"largest difference to the network in float32, on random images: {1e3 * self.largest_difference:.3g} mm",
            f"folded, with MFLOP saved per image ({self.flops_saved / 1e6:.1f} in all):",
        ]
        lines += [f"  {fold.name:{width}}  {fold.flops_saved / 1e6:8.2f}  {fold.description}" for fold in self.folds]
        return "\n".join(lines)
