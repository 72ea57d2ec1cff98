"""Scalars and pictures of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

_FIXED = ("step", "samples", "seconds")


class Board:
    """Writes an event file.

    Args:
        folder: where ``tensorboard --logdir`` looks.
        resume_step: events of later steps, made after the checkpoint that a run goes on from, are hidden; 0: all.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("tensorboard is not installed: pip install tensorboard, or --no-tensorboard") from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def scalars(self, step: int, row: Mapping[str, float | int]) -> None:
        """One point per value of a row of the log."""
        for name, value in row.items():
            if name not in _FIXED:
                group = "errors" if name in ("mpjpe", "pa_mpjpe", "mpvpe") else "training"
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        """Add uint8 [H, W, 3]."""
        self._writer.add_image("meshes", image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
