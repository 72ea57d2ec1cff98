"""What torch.compile must leave out. A module of its own: the decorator imports the compiler, which takes seconds."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


@torch.compiler.disable
def call_eagerly(backbone: nn.Module, images: Tensor) -> Tensor:
    """``backbone(images)``, not traced."""
    return cast(Tensor, backbone(images))
