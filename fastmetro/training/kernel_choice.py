"""Among which kernels PyTorch chooses while it trains."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def kernel_choice(device: torch.device, deterministic: bool) -> Iterator[None]:
    """On a GPU the fastest convolutions that cuDNN finds by trying them, or those that give equal bits in equal runs.

    Where an operation of PyTorch has none of the latter kind, it warns.
    """
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # an object in place of a module, which its annotations do not know
    before = cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.benchmark = device.type == "cuda" and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS' documentation, "Results reproducibility"
        cudnn.deterministic, memory.fill_uninitialized_memory = True, False
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
