"""A small trunk with convolutions, and both optimizers over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.backbones.half_weights import half_copy, keep_half_weights
from fastmetro.models.backbones.overlap import convolve, overlap_weight_gradients
from fastmetro.training.optimizer import ClippedAdamW
from fastmetro_kernels.backends import triton_reasons

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BFLOAT = torch.bfloat16
_PLACES = [(device, backend) for device in ("cpu", "cuda") for backend in ("reference", "triton")]
PLACES = [
    (device, backend)
    for device, backend in _PLACES
    if (device == "cpu" or torch.cuda.is_available())
    and (backend == "reference" or not triton_reasons(torch.device(device)))
]
places = pytest.mark.parametrize(("device", "backend"), PLACES, ids="-".join)


class Trunk(nn.Module):
    """Two convolutions of which the second has strides that mean nothing, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.second, torch.tanh(convolve(self.first, x)))
        return self.head(y.float().mean((2, 3)))


def trunk(device: str = "cpu", seed: int = 0, half: bool = False) -> Trunk:
    torch.manual_seed(seed)
    module = Trunk().to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if half:
        overlap_weight_gradients(module)
        assert keep_half_weights(module, BFLOAT) == 2
    return module


def images(step: int, device: str = "cpu") -> Tensor:
    drawn = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return drawn.to(device).contiguous(memory_format=torch.channels_last)


def backward(module: nn.Module, step: int, device: str = "cpu") -> None:
    with torch.autocast(device, BFLOAT):
        out = module(images(step, device))
    out.float().square().sum().backward()


def groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices = [one for one in module.parameters() if one.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [one for one in module.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]


def theirs(module: nn.Module, rate: float | Tensor = 0.01, capturable: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(module), lr=rate, betas=(0.9, 0.98), fused=True, capturable=capturable)


def ours(module: nn.Module, backend: str = "auto", rate: float | Tensor = 0.01) -> ClippedAdamW:
    return ClippedAdamW(groups(module), lr=rate, betas=(0.9, 0.98), backend=backend)


def gradients_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        kept = half_copy(parameter)
        found = parameter.grad if kept is None or kept.tensor.grad is None else kept.tensor.grad
        assert found is not None, name
        yield name, found


def assert_equal(one: nn.Module, other: nn.Module, exactly: bool = True, atol: float = 1e-6) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if exactly:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=atol, msg=name)
