"""Convolutions and linear layers + bias (+ residual) + ReLU in one call on the CPU, by oneDNN through PyTorch.

The operators are those that `torch.compile` emits on the CPU. They take the weight in oneDNN's own layout for the very
shape of the input; in any other layout they reorder it at each call, which can cost several times the product. So a
weight is packed once per input shape, when the shape is first seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

SHAPES_KEPT = 4
"""Packed copies of a weight that are kept, one per input shape; each is as large as the weight."""

_packing = threading.Lock()


def usable(x: Tensor) -> bool:
    """Whether the fused operators take ``x``: on the CPU, not empty, of a type that oneDNN computes in here."""
    if x.device.type != "cpu" or x.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled:
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if x.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return x.dtype == torch.float32


class WeightPacks:
    """Copies of one weight in oneDNN's layouts, at most ``SHAPES_KEPT`` of them.

    A copy is made anew when the weight was replaced or written to. Safe under threads. Copies and pickles are empty:
    packed tensors can be neither copied nor saved.
    """

    def __init__(self) -> None:
        self._packs: dict[Hashable, tuple[Tensor, Tensor, int]] = {}

    def __reduce__(self) -> tuple[type[WeightPacks], tuple[()]]:
        return WeightPacks, ()

    def get(self, weight: Tensor, shape: torch.Size, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        """``weight`` [O, I, h, w] of a convolution packed for an input of ``shape`` [B, I, H, W]."""
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        return self._kept(weight, shape, lambda: reorder(weight, padding, stride, (1, 1), 1, shape))

    def linear(self, weight: Tensor, rows: int) -> Tensor:
        """``weight`` [N, K] of a linear layer packed for so many rows."""
        return self._kept(weight, rows, lambda: torch.ops.mkldnn._reorder_linear_weight(weight, rows))

    def _kept(self, weight: Tensor, key: Hashable, pack: Callable[[], Tensor]) -> Tensor:
        version = -1 if weight.is_inference() else weight._version
        found = self._packs.get(key)
        if found is not None and found[1] is weight and found[2] == version:
            return found[0]
        packed = pack()
        with _packing:
            self._packs.pop(key, None)
            while len(self._packs) >= SHAPES_KEPT:
                del self._packs[next(iter(self._packs))]
            self._packs[key] = packed, weight, version
        return packed

    def clear(self) -> None:
        """Forget all copies."""
        with _packing:
            self._packs.clear()


def convolution_relu(
    x: Tensor, packed: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int], relu: bool
) -> Tensor:
    """Convolution + bias, with or without ReLU: x [B, I, H, W] -> [B, O, h, w], channels_last."""
    unary = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, (1, 1), 1, unary, [], None)


def convolution_add_relu(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    residual: Tensor,
) -> Tensor:
    """ReLU of convolution + bias + ``residual`` [B, O, h, w], which is only read."""
    if residual.shape[2:].numel() == 1:  # PyTorch 2.11 describes it to oneDNN so that "could not create a memory"
        return convolution_relu(x, packed, bias, stride, padding, relu=False).add_(residual).relu_()
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, packed, bias, padding, stride, (1, 1), 1, "add", None, "relu", [], None
    )


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, relu: bool, residual: Tensor | None = None) -> Tensor:
    """x [..., K] W^T + bias, then ReLU if asked, or + ``residual`` of the result's shape, contiguous and only read."""
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "relu" if relu else "none", [], "")
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return y.relu_() if relu else y
