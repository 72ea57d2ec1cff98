"""Learning rate over a run, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import nn

from fastmetro.training.optimizer import ClippedAdamW
from fastmetro_kernels.backends import triton_reasons

Schedule = Literal["cosine", "constant", "step"]
Decay = Literal["matrices", "all"]
Fused = Literal["auto", "torch", "project"]
DROP = 0.1
"""What each drop of the schedule "step" multiplies the rate by."""


def learning_rate_factor(
    progress: float, warmup: float, schedule: Schedule = "cosine", drop_at: Sequence[float] = ()
) -> float:
    """What the peak rate is multiplied by at ``progress`` in [0, 1] of the run.

    All schedules rise linearly over the first ``warmup`` share of the run. Then "cosine" is half a cosine down to 0,
    "constant" stays, and "step" is divided by ten at each of the shares ``drop_at``.
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min((progress - warmup) / (1.0 - warmup), 1.0)))
    if schedule == "step":
        return math.prod(DROP for share in drop_at if progress >= share)
    return 1.0


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    decay: Decay = "matrices",
    betas: tuple[float, float] = (0.9, 0.98),
    capturable: bool = False,
    fused: Fused = "torch",
) -> torch.optim.AdamW | ClippedAdamW:
    """AdamW.

    Args:
        model: whose parameters that require gradients.
        learning_rate: of both groups.
        weight_decay: how much parameters decay.
        decay: "matrices": only matrices and convolutions, not biases, norms and learned tokens; "all": everything, as
            published (protocol 3.8).
        betas: of AdamW.
        capturable: for CUDA graphs: the rate is a tensor, which :func:`set_learning_rate` changes in place.
        fused: whose AdamW: PyTorch's, which is fused on a GPU, this project's
            (:class:`~fastmetro.training.optimizer.ClippedAdamW`), or with "auto" this project's where its kernels run
            on a GPU. Their states are the same.

    Raises:
        ValueError: another choice.
    """
    if fused not in get_args(Fused):
        raise ValueError(f"fused must be one of {', '.join(map(repr, get_args(Fused)))}, got {fused!r}")
    tokens = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = decay == "matrices" and (parameter.ndim < 2 or id(parameter) in tokens)
            (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    device = next(model.parameters()).device
    rate = torch.tensor(learning_rate, device=device) if capturable else learning_rate
    if fused == "project" or (fused == "auto" and device.type == "cuda" and not triton_reasons(device)):
        return ClippedAdamW(groups, lr=rate, betas=betas)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=device.type == "cuda", capturable=capturable)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
