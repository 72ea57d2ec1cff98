"""What the tests of the fused ops share: where they can run, the error budget, and memory that must not be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused.inference import DTYPES, choose_backend

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Runner:
    """A device, backend and dtype that can run here."""

    device: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def interpreted(self) -> bool:
        """Triton in its interpreter: about a millisecond per program, so sizes must be small."""
        return self.backend == "triton" and self.device == "cpu"


def _can_run(runner: Runner) -> bool:
    if runner.interpreted and runner.dtype != FLOAT:
        return False  # the interpreter has no arithmetic of half precision of its own
    try:
        choose_backend("op", runner.backend, torch.device(runner.device), runner.dtype)
    except BackendUnavailable:
        return False
    return True


_DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
_BACKENDS = ("triton", "reference")
_ALL = [Runner(device, backend, dtype) for device in _DEVICES for backend in _BACKENDS for dtype in DTYPES]
RUNNERS = [runner for runner in _ALL if _can_run(runner)]
TRITON_RUNNERS = [runner for runner in RUNNERS if runner.backend == "triton"]
ONE_EACH = [runner for runner in RUNNERS if runner.dtype == (FLOAT if runner.device == "cpu" else HALF)]
"""One dtype per device and backend."""

everywhere = pytest.mark.parametrize("runner", RUNNERS, ids=str)
on_each_backend = pytest.mark.parametrize("runner", ONE_EACH, ids=str)
on_triton = pytest.mark.parametrize("runner", TRITON_RUNNERS, ids=str)
on_cuda = pytest.mark.parametrize("runner", [r for r in TRITON_RUNNERS if r.device == "cuda"], ids=str)


def randn(runner: Runner, *shape: int, seed: int = 0) -> Tensor:
    """The same numbers for every backend and device."""
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(runner.device, runner.dtype)


def surrounded(x: Tensor) -> Tensor:
    """x as a part of a tensor that is NaN on all sides."""
    room = torch.full([size + 2 for size in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    inside = room[tuple(slice(1, -1) for _ in x.shape)]
    return inside.copy_(x)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory of PyTorch is NaN: what a kernel does not write shows."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous[0])
        torch.utils.deterministic.fill_uninitialized_memory = previous[1]


def assert_within_budget(got: Tensor, exact: Tensor, plain: Tensor, rounding: Tensor) -> None:
    """No element further from float64 than twice the worst of plain PyTorch in the same dtype, plus roundings.

    `rounding` holds what may be rounded per element beside that: where plain PyTorch is exact by luck, ours need not.
    """
    assert got.shape == exact.shape and got.is_contiguous()
    if exact.numel() == 0:
        return
    error, plain_error = ((tensor.to(DOUBLE) - exact).abs() for tensor in (got, plain))
    excess = error - (2 * plain_error.amax() + rounding)
    assert bool((excess <= 0).all()), f"error {error.amax():.3g}, plain PyTorch {plain_error.amax():.3g}"
