"""TF32 of float32 work on a GPU: a setting of the process, which an engine must not follow once it is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_PRODUCTS: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn  # PyTorch's annotations lack parts of it


@dataclass(frozen=True)
class TensorFloat32:
    """Whether float32 matrix products and convolutions on a GPU may use TF32."""

    products: bool
    convolutions: bool

    @classmethod
    def current(cls) -> TensorFloat32:
        """As PyTorch is set now, through whichever of its interfaces."""
        # `allow_tf32` cannot be read after its successor `fp32_precision` was set, `fp32_precision` always can.
        return cls(_PRODUCTS.fp32_precision == "tf32", _CUDNN.conv.fp32_precision == "tf32")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set PyTorch so; restored afterwards. It holds for the whole process, all threads among it."""
        before = TensorFloat32.current()
        if before == self:
            yield
            return
        spelled = _PRODUCTS.fp32_precision, _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision
        _switch(before, self)
        try:
            yield
        finally:
            _switch(self, before)
            # "none" (as the whole process) and "ieee" are both no TF32.
            _PRODUCTS.fp32_precision, _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision = spelled


def _switch(before: TensorFloat32, after: TensorFloat32) -> None:
    """Change what differs. `allow_tf32` sets what both interfaces read, and cuBLAS wants both to agree."""
    if before.products != after.products:
        _PRODUCTS.allow_tf32 = after.products
    if before.convolutions != after.convolutions:
        _CUDNN.allow_tf32 = after.convolutions
