"""The reference backend of the residual norm in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.dropout.ops import dropout_kept
from fastmetro_kernels.dropout.random import scale_of_kept


def forward(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, epsilon: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``residual_norm``. In float32 (float64 for float64 tensors), each result rounded once; autograd
    differentiates it."""
    new_stream = stream
    if branch is not None:
        promoted = torch.promote_types(stream.dtype, branch.dtype)
        wide = torch.promote_types(promoted, torch.float32)
        added = branch.to(wide) if branch_bias is None else branch.to(wide) + branch_bias
        if seed is not None:
            width = branch.shape[-1]
            stays = dropout_kept(seed, branch.numel() // width, width, dropout_p).view(branch.shape)
            added = added * (stays.to(wide) * scale_of_kept(dropout_p))
        new_stream = (stream.to(wide) + added).to(promoted)
    x = new_stream.to(weight.dtype)
    return new_stream, F.layer_norm(x, x.shape[-1:], weight, bias, epsilon).to(dtype)
