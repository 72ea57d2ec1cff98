"""Training steps: ours, the published network's, and those of plain PyTorch."""

from bench.training.command import main

__all__ = ["main"]
