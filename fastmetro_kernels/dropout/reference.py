"""The reference backend of the dropout in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels.dropout.ops import dropout_kept
from fastmetro_kernels.dropout.random import scale_of_kept


def forward(x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    """See ``relu_dropout``. In float32 (float64 for float64 x), rounded once; autograd differentiates it.

    What the result is where it has no gradient is computed apart: no part of it counts, whatever the gradient is.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias
    scaled, otherwise = wide if seed is None else wide * scale_of_kept(p), wide.detach().relu()
    let = scaled.to(x.dtype) > 0  # a sum that is rounded to 0 has no gradient
    if seed is None:
        return torch.where(let, scaled, otherwise).to(x.dtype)
    stays = dropout_kept(seed, 1, x.numel(), p).view(x.shape)
    return torch.where(let & stays, scaled, otherwise * stays).to(x.dtype)
