"""Weights as safetensors files, with a record of how they came about."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastmetro.files import replacing

ExportDtype = Literal["bfloat16", "float32"]
"""Of matrices and convolutions in a file."""
SHIPPED_BYTES = 16 * 2**20
"""Weights inside the package may not be larger."""


def weights_bytes(model: nn.Module, dtype: ExportDtype) -> int:
    """What the weights take in a file, without its header."""
    return sum(value.numel() * _written(value, dtype).itemsize for value in model.state_dict().values())


def _written(value: Tensor, dtype: ExportDtype) -> torch.dtype:
    if not value.is_floating_point() or value.ndim < 2:
        return value.dtype
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def export_weights(
    model: nn.Module,
    path: Path,
    record: Mapping[str, object],
    max_bytes: int | None = None,
    dtype: ExportDtype = "bfloat16",
) -> int:
    """Write the state dict: matrices and convolutions in ``dtype``, vectors (norms, biases, statistics) as they are.

    Args:
        model: whose weights.
        path: the .safetensors file, which appears complete or not at all.
        record: how they were made; stored as JSON strings in the file's metadata.
        max_bytes: refuse to write more; None writes any size.
        dtype: "bfloat16", as what ships, or "float32".

    Returns:
        The file's size in bytes.

    Raises:
        ValueError: if a weight is not finite, the file would be larger than ``max_bytes``, or another ``dtype``.
        OSError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if dtype not in get_args(ExportDtype):
        raise ValueError(f"dtype must be one of {', '.join(map(repr, get_args(ExportDtype)))}, got {dtype!r}")
    tensors = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds values that are not finite; nothing was written to {path}")
        tensors[name] = value.detach().to("cpu", _written(value, dtype)).contiguous()
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()}
    with replacing(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        os.chmod(temporary, 0o644)  # it makes files that only the owner can read
        size = os.path.getsize(temporary)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"the weights take {size} bytes, more than {max_bytes}; nothing was written to {path}")
    return size
