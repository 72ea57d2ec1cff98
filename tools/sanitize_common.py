"""What the cases of `sanitize_cases.py` share: types, and how far results may be off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {HALF: 1e-2, BFLOAT: 6e-2, FLOAT: 1e-4}
"""Largest difference to float32 on the CPU, relative to the largest number."""


@contextlib.contextmanager
def written_results() -> Iterator[None]:
    """PyTorch writes NaN into all new memory. For results that the copy engine stores (``cp.async.bulk``): initcheck
    does not see that, and would report every number of them. What is not stored stays NaN, which `compare` finds."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise unless both are equal up to the tolerance and infinite in the same places."""
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    if not torch.equal(got[~finite], want[~finite]):
        raise AssertionError(f"{name}: infinite numbers differ")
    error = (got[finite] - want[finite]).abs().amax().item() if finite.any() else 0.0
    allowed = tolerance * max(want[finite].abs().amax().item(), 1.0) if finite.any() else 0.0
    if not error <= allowed:
        raise AssertionError(f"{name}: differs by {error:.3g} from plain PyTorch, allowed are {allowed:.3g}")
