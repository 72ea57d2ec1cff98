"""Shared fixtures. Without a CUDA device Triton kernels run in the interpreter, which must be chosen before import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: what passes here passes there. HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Convolutions on a GPU use TF32 unless told otherwise; float32 tests mean float32.
torch.backends.cudnn.allow_tf32 = False

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine that the kernels run on."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published data and golden outputs; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of published data at {SHARED}")
    return SHARED
