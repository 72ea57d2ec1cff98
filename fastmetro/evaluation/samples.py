"""Errors of all samples of a data set, and their means: exact ones, and as the released code takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleErrors:
    """Errors in mm, float64 [N], of samples in the order of their rows.

    Attributes:
        rows: int64 [N], which rows of the data set they are.
        mpjpe, pa_mpjpe, mpvpe, pa_mpvpe: of each sample, whether its labels count or not.
        has_joints, has_vertices: bool [N], which of them count.
    """

    rows: Tensor
    mpjpe: Tensor
    pa_mpjpe: Tensor
    mpvpe: Tensor
    pa_mpvpe: Tensor
    has_joints: Tensor
    has_vertices: Tensor

    @classmethod
    def join(cls, parts: Sequence[SampleErrors]) -> SampleErrors:
        """All parts as one, ordered by row."""
        joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        order = joined["rows"].argsort()
        return cls(**{name: value[order] for name, value in joined.items()})

    def means(self) -> dict[str, float]:
        """Means over the samples with the label, summed exactly: the same for any number of processes.

        NaN where no sample has it.
        """
        return {
            "mpjpe": _mean(self.mpjpe[self.has_joints]),
            "pa_mpjpe": _mean(self.pa_mpjpe[self.has_joints]),
            "mpvpe": _mean(self.mpvpe[self.has_vertices]),
            "pa_mpvpe": _mean(self.pa_mpvpe[self.has_vertices]),
        }

    def published_means(self, processes: int = 1, batch_size: int = 16) -> dict[str, float]:
        """What the released code prints when it evaluates with so many processes (protocol 3.9).

        Every process gets each processes-th sample, the first ones again where the samples do not divide. PA-MPJPE is
        the mean over *all* samples of a batch, weighted by how many have 3D joints. The result is the plain mean of the
        processes' means, in which one without any sample with the label counts as 0.

        Raises:
            ValueError: an argument is less than 1.
        """
        if processes < 1 or batch_size < 1:
            raise ValueError(f"processes and batch_size must be at least 1, got {processes} and {batch_size}")
        count = len(self.rows)
        padded = torch.arange(math.ceil(count / processes) * processes) % max(count, 1)
        parts = [self._published_process(padded[rank::processes], batch_size) for rank in range(processes)]
        return {name: math.fsum(part[name] for part in parts) / processes for name in parts[0]}

    def _published_process(self, samples: Tensor, batch_size: int) -> dict[str, float]:
        sums = dict.fromkeys(("mpjpe", "pa_mpjpe", "mpvpe", "pa_mpvpe"), 0.0)
        joints = vertices = 0
        for batch in samples.split(batch_size):
            there, meshes = self.has_joints[batch], self.has_vertices[batch]
            joints, vertices = joints + int(there.sum()), vertices + int(meshes.sum())
            sums["mpjpe"] += float(self.mpjpe[batch][there].sum())
            sums["pa_mpjpe"] += _mean(self.pa_mpjpe[batch]) * int(there.sum()) if bool(there.any()) else 0.0
            sums["mpvpe"] += float(self.mpvpe[batch][meshes].sum())
            sums["pa_mpvpe"] += float(self.pa_mpvpe[batch][meshes].sum())
        counts = {"mpjpe": joints, "pa_mpjpe": joints, "mpvpe": vertices, "pa_mpvpe": vertices}
        return {name: value / counts[name] if counts[name] else 0.0 for name, value in sums.items()}


def _mean(values: Tensor) -> float:
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan
