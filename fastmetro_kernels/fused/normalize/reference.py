"""The reference backend of the row norm in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normalize(x: Tensor, shift: Tensor | None, epsilon: float, marks: int = 0) -> Tensor:
    """The layer norm of the rows of x ``[B, M, K]`` plus shift ``[K]``, in float32 (float64 for float64 x).

    Behind each row so many marks: 1 at its place among the M.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if shift is not None:
        wide = wide + shift
    found = F.layer_norm(wide, wide.shape[-1:], eps=epsilon).to(x.dtype).contiguous()
    if not marks:
        return found
    places = torch.eye(x.shape[1], marks, dtype=x.dtype, device=x.device)
    return torch.cat([found, places.expand(len(x), -1, -1)], -1)
