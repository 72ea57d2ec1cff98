"""A batch of TSV rows, as training and evaluation take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TsvBatch:
    """B samples of TSV files, cropped and augmented. J, P = 24, 72 (body) or 21, 48 (hand).

    Attributes:
        keys: of the rows, as :class:`~fastmetro.data.tsv.source.Row` has them.
        images: float32 [B, 3, S, S], normalised with ImageNet's mean and deviation.
        joints_2d: float32 [B, J, 3], crop coordinates (in [-1, 1] inside) and visibility.
        joints_3d: float32 [B, J, 4], metres, minus the root (J24's pelvis, index 14; the wrist of a hand, index 0), and
            confidence.
        pose: float32 [B, P], axis-angle, augmented.
        betas: float32 [B, 10].
        has_joints_2d, has_joints_3d, has_smpl: bool [B].
        genders: as :class:`~fastmetro.data.tsv.rows.Label` has them.
        skipped: rows that could not be used, by problem; training replaces them, evaluation leaves them out.
    """

    keys: list[str]
    images: Tensor
    joints_2d: Tensor
    joints_3d: Tensor
    pose: Tensor
    betas: Tensor
    has_joints_2d: Tensor
    has_joints_3d: Tensor
    has_smpl: Tensor
    genders: list[str]
    skipped: dict[str, int]

    def to(self, device: torch.device | str) -> TsvBatch:
        """The same batch on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> TsvBatch:
        """The same batch in page-locked memory, for copies that do not block; a DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TsvBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)
