"""What tests do to a contender's result, to see that a benchmark notices."""

from __future__ import annotations

from typing import Any

import torch


class Scaled(torch.autograd.Function):
    """The result is right, its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 1.01 * grad
