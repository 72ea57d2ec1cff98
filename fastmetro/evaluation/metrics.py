"""Errors of recovered joints and meshes, vectorised over the batch, per sample, in the unit of the inputs.

MPJPE is the mean Euclidean distance of the joints after both sides are recentred at their root; PA-MPJPE the
same after the similarity transform (scale, rotation, translation) that fits the prediction best to the truth;
MPVPE the mean distance of the root-relative vertices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _check_points(prediction: Tensor, target: Tensor) -> None:
    for name, value in (("prediction", prediction), ("target", target)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {getattr(value, 'dtype', type(value))}")
    if prediction.ndim != 3 or prediction.shape[-1] != 3 or prediction.shape[1] == 0:
        raise ValueError(f"prediction must have shape [B, N >= 1, 3], got {tuple(prediction.shape)}")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )


def root_position(joints: Tensor, roots: Sequence[int]) -> Tensor:
    """Mean of the root joints: [B, J, 3] -> [B, 1, 3]. For the body they are the hips, for the hand the wrist.

    Raises:
        ValueError: if there are no roots.
        IndexError: if a root is not one of the joints.
    """
    if not roots:
        raise ValueError("roots must name at least one joint")
    return joints[:, list(roots)].mean(dim=1, keepdim=True)


def point_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean Euclidean distance of corresponding points: two [B, N, 3] -> [B].

    Raises:
        TypeError: if an input is no floating point tensor.
        ValueError: if the shapes are not [B, N, 3] or differ.
    """
    _check_points(prediction, target)
    return (prediction - target).norm(dim=-1).mean(dim=1)


def mpjpe(prediction: Tensor, target: Tensor, roots: Sequence[int]) -> Tensor:
    """Mean per-joint position error after recentring both at the mean of ``roots``: two [B, J, 3] -> [B].

    Raises:
        TypeError: if an input is no floating point tensor.
        ValueError: if the shapes are not [B, J, 3] or differ, or there are no roots.
        IndexError: if a root is not one of the joints.
    """
    _check_points(prediction, target)
    return point_error(prediction - root_position(prediction, roots), target - root_position(target, roots))


def procrustes_align(prediction: Tensor, target: Tensor) -> Tensor:
    """The similarity transform of ``prediction`` that is nearest to ``target`` in the least-squares sense.

    Rotation, uniform scale and translation; never a reflection (the smallest singular direction is flipped
    instead: Umeyama 1991, equations 39-43). A prediction whose points all coincide is moved to the target's
    centre. Computed in float64, returned in the dtype of ``prediction``, shape [B, N, 3].

    Raises:
        TypeError: if an input is no floating point tensor.
        ValueError: if the shapes are not [B, N, 3] or differ, or a value is not finite.
    """
    _check_points(prediction, target)
    source, goal = prediction.double(), target.double()
    if not bool(torch.isfinite(source).all() & torch.isfinite(goal).all()):
        raise ValueError("prediction and target must be finite to be aligned; at least one value is NaN or infinite")
    source_mean, goal_mean = source.mean(dim=1, keepdim=True), goal.mean(dim=1, keepdim=True)
    source, goal = source - source_mean, goal - goal_mean
    left, singular, right = torch.linalg.svd(source.transpose(1, 2) @ goal)
    signs = torch.ones_like(singular)
    signs[:, 2] = torch.where(torch.linalg.det(left @ right) < 0, -1.0, 1.0)
    rotation = (left * signs.unsqueeze(1)) @ right
    spread = source.square().sum(dim=(1, 2))
    scale = (singular * signs).sum(dim=1) / spread.clamp_min(torch.finfo(torch.float64).tiny)
    aligned = scale.view(-1, 1, 1) * (source @ rotation) + goal_mean
    return aligned.to(prediction.dtype)


def pa_mpjpe(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean distance after :func:`procrustes_align`, for joints or vertices alike: two [B, N, 3] -> [B].

    Raises:
        TypeError: if an input is no floating point tensor.
        ValueError: if the shapes are not [B, N, 3] or differ, or a value is not finite.
    """
    return point_error(procrustes_align(prediction, target), target)


class MeanMetrics:
    """Running means of per-sample values, summed in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, valid: Tensor | None = None, **values: Tensor) -> None:
        """Add the values of some samples.

        Args:
            valid: bool [B], which samples have the label; the others count for nothing. None: all have it.
            values: by metric, [B] each.

        Raises:
            TypeError: ``valid`` is not bool. Numbers of samples would read as a mask.
            ValueError: values are not [B], or ``valid`` has another shape than they. Nothing was added then.
        """
        if valid is not None and valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool mask [B], got {valid.dtype}")
        for name, value in values.items():
            if value.ndim != 1:
                raise ValueError(f"{name} must have shape [B], got {tuple(value.shape)}")
            if valid is not None and valid.shape != value.shape:
                raise ValueError(f"valid must have the shape of {name}, {tuple(value.shape)}, got {tuple(valid.shape)}")
        for name, value in values.items():
            kept = value if valid is None else value[valid]
            self._sums[name] = self._sums.get(name, 0.0) + float(kept.double().sum())
            self._counts[name] = self._counts.get(name, 0) + kept.numel()

    def compute(self) -> dict[str, float]:
        """The mean of each metric over all samples that have it so far, in the unit given; NaN where none has."""
        return {
            name: total / self._counts[name] if self._counts[name] else float("nan")
            for name, total in self._sums.items()
        }
