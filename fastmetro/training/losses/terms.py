"""Sums of errors where labels exist, and their means. A label that is absent may hold anything, even NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def weak_perspective(points: Tensor, camera: Tensor) -> Tensor:
    """Project [B, N, 3] with ``camera`` [B, 3] = (s, tx, ty) into the crop: s * (xy + t), [B, N, 2] in [-1, 1]."""
    scale, shift = camera.unsqueeze(1).split([1, 2], dim=-1)
    return scale * (points[..., :2] + shift)


def masked_l1(prediction: Tensor, target: Tensor, valid: Tensor, confidence: Tensor | None = None) -> Tensor:
    """Mean absolute error over the samples where ``valid`` [B] holds; 0 (with zero gradients) if none does.

    ``confidence`` [B, N] additionally weighs the N points of a sample.
    """
    weight = valid.to(prediction.dtype).unsqueeze(1).expand(prediction.shape[:2])
    if confidence is not None:
        weight = weight * confidence.to(prediction.dtype)
    goal = torch.where(weight.unsqueeze(-1) > 0, target, prediction.detach())
    total = weight.sum() * prediction.shape[-1]
    return weighted_l1_sum(prediction, goal, weight) / (total + (total == 0))


def weighted_l1_sum(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum of the absolute errors of [B, N, D], each times the weight [B, N] of its point. The target is finite."""
    return ((prediction - target).abs() * weight.unsqueeze(-1)).sum()


def l1_sum(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Sum of the absolute errors of [B, ...] where ``valid`` [B] holds."""
    return F.l1_loss(prediction, known(target, valid, prediction), reduction="sum")


def squared_sum(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Sum of the squared errors of [B, ...] where ``valid`` [B] holds."""
    return F.mse_loss(prediction, known(target, valid, prediction), reduction="sum")


def known(target: Tensor, valid: Tensor, prediction: Tensor) -> Tensor:
    """The target [B, ...]; where ``valid`` [B] does not hold the prediction itself, so that error and gradient are 0.

    Replacing the label, rather than multiplying the error by 0, keeps a label of NaN out of the gradient.
    """
    return torch.where(valid.view(-1, *(1 for _ in prediction.shape[1:])), target, prediction.detach())


def combine(sums: Mapping[str, Tensor], counts: Tensor, factors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted total and detached means of sums (scalars, in the order of ``counts`` and ``factors``, both [T]).

    Where a count is 0 the mean is 0.

    Raises:
        ValueError: ``counts`` has another shape.
    """
    if counts.shape != factors.shape:
        raise ValueError(f"counts must be [{len(factors)}], one for each of {list(sums)}, got {list(counts.shape)}")
    means = torch.stack(list(sums.values())) / (counts + (counts == 0))
    first, *others = (means * factors).unbind()
    return sum(others, start=first), dict(zip(sums, means.detach().unbind(), strict=True))
