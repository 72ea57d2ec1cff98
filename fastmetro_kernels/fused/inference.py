"""What the fused ops have in common: they run on Triton or in plain PyTorch, and have no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Accepted dtypes; float64 runs on the reference alone."""


def check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], device: torch.device | None = None) -> None:
    """A dense tensor of one of the dtypes, on the device if one is given.

    Raises:
        TypeError: not a dense tensor, or another dtype.
        ValueError: on another device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {accepted}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def refuse_gradients(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises RuntimeError where autograd would want a gradient that the op does not have."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op} is for inference and has no gradients, but {name} requires grad: call it under "
                f"torch.no_grad() or torch.inference_mode(), or pass {name}.detach()"
            )


def check_epsilon(name: str, value: object, meaning: str = "a number") -> None:
    """A finite number of at least 0.

    Raises:
        TypeError: no number.
        ValueError: negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {meaning}, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_config(config: Any, kind: type, problem: Callable[[Any], str | None]) -> None:
    """A tile configuration of the right kind, or None.

    Raises:
        TypeError: another kind.
        ValueError: numbers that are not accepted; `problem` tells which.
    """
    if config is None:
        return
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")
    if found := problem(config):
        raise ValueError(f"config: {found}")


def aligned(tensor: Tensor, multiple: int) -> bool:
    """Whether a tensor begins at such an address. A traced one has none: native ops look once more when they run."""
    return torch.compiler.is_compiling() or tensor.data_ptr() % multiple == 0


@assumed_constant
def choose_backend(op: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs a call; see :func:`fastmetro_kernels.backends.select`.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: the named backend cannot take such tensors; the message tells why.
    """
    order = ("reference",) if backends.triton_interpreted() else ("triton", "reference")
    return backends.select(op, requested, backend_reasons(device, dtype), order)


def backend_reasons(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    """For both backends that every op has, why they cannot take such tensors; empty where they can."""
    triton = list(backends.triton_reasons(device))
    if dtype == torch.float64:
        triton.append("float64 is not supported")
    if dtype == torch.bfloat16 and device.type == "cpu":
        triton.append("Triton's interpreter computes bfloat16 wrongly")
    return {"reference": [], "triton": triton}
