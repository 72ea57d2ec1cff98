"""The reference backend: PyTorch's own operations on lists of tensors, for every device. The specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmetro_kernels.adamw.api import AdamWGroup


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The global L2 norm, in float32 (float64 where a gradient is): as ``torch.nn.utils.get_total_norm`` takes it."""
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    norms = [torch.linalg.vector_norm(gradient, dtype=wide) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def adamw(groups: Sequence[AdamWGroup], gradients: Sequence[Tensor], max_norm: float | None) -> Tensor | None:
    """``clip_grad_norm_`` and the fused AdamW of PyTorch, but that gradients stay as they are."""
    norm = scale = None
    if max_norm is not None:
        norm = gradient_norm(gradients)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    begin = 0
    for group in groups:
        count = len(group.parameters)
        if not count:
            continue
        own = [g.to(p.dtype) for g, p in zip(gradients[begin : begin + count], group.parameters, strict=True)]
        begin += count
        if scale is not None:
            own = list(torch._foreach_mul(own, scale.to(own[0].dtype)))
        torch._foreach_add_(list(group.steps), 1)
        torch._fused_adamw_(
            list(group.parameters), own, list(group.exp_avgs), list(group.exp_avg_sqs), [], list(group.steps),
            lr=group.rate, beta1=group.betas[0], beta2=group.betas[1], weight_decay=group.weight_decay,
            eps=group.epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip
        if group.halves is not None:
            for parameter, half in zip(group.parameters, group.halves, strict=True):
                if half is not None:
                    half.copy_(parameter)
    return norm
