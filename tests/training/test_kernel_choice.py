"""What PyTorch chooses its kernels by while it trains, and that this is put back."""

from __future__ import annotations

import pytest
import torch

from fastmetro.training.kernel_choice import kernel_choice


def state() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chosen_and_put_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = state()
    with kernel_choice(torch.device(device), False):
        assert state() == (device == "cuda", False, False)
    with pytest.raises(ZeroDivisionError), kernel_choice(torch.device(device), True):
        assert state() == (False, True, True) and torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise ZeroDivisionError
    assert state() == before and torch.utils.deterministic.fill_uninitialized_memory
