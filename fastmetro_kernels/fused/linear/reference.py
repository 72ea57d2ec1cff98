"""The reference backend: the fused linear layer in plain PyTorch, for every device and dtype. The specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    leading: Tensor | None,
    normalize: float | None,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """``act(norm(x) @ weight.T + bias) + residual``, everything summed in float32 (float64 for float64 ``x``).

    Only the normalised rows are rounded to the dtype of ``x`` on the way, as a layer norm of its own would do (the
    kernel may leave that out), and the result to ``out_dtype``.

    Args:
        x: ``[B, M, K]``.
        weight: ``[N, K]``, in the dtype of x or float32.
        bias: ``[N]``, ``[M, N]`` or None.
        residual: ``[B, M, N]`` or None.
        leading: ``[B, P, N]`` that come in front of the result's rows, or None.
        normalize: Epsilon of the layer norm, or None for none.
        relu: Whether negative numbers become 0 before the residual is added.
        out_dtype: Of the result.

    Returns:
        ``[B, P + M, N]``, contiguous.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    if normalize is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], eps=normalize).to(x.dtype).to(wide)
    result = F.linear(rows, weight.to(wide))
    if bias is not None:
        result = result + bias.to(wide)
    if relu:
        result = result.relu()
    if residual is not None:
        result = result + residual.to(wide)
    if leading is not None:
        result = torch.cat([leading.to(wide), result], dim=1)
    return result.to(out_dtype).contiguous()


def moments(x: Tensor) -> Tensor:
    """(count, mean, squared distances from it) of the rows of x ``[B, M, N]``, in one part: ``[B, M, 1, 3]``.

    float32, or float64 for float64 ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = torch.full_like(wide[..., 0], x.shape[-1])
    mean = wide.sum(-1) / x.shape[-1]
    return torch.stack([count, mean, (wide - mean.unsqueeze(-1)).square().sum(-1)], dim=-1).unsqueeze(2)
