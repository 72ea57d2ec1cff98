"""Small cases for pytest-benchmark: `python -m pytest bench --benchmark-enable`. Not part of the test run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.attention import Case, make_case


@pytest.fixture(scope="module", params=[64, 16], ids=lambda dim: f"d{dim}")
def case(request: pytest.FixtureRequest) -> Case:
    """14 + 431 tokens, 8 heads."""
    torch.set_num_threads(2)
    return make_case(431, request.param, torch.float32, torch.device("cpu"))


def test_forward(benchmark: Any, case: Case) -> None:
    with torch.no_grad():
        benchmark(case.ours)


def test_forward_sdpa(benchmark: Any, case: Case) -> None:
    with torch.no_grad():
        benchmark(case.sdpa)


def test_forward_backward(benchmark: Any, case: Case) -> None:
    benchmark(case.ours_with_gradients)


def test_forward_backward_sdpa(benchmark: Any, case: Case) -> None:
    benchmark(case.sdpa_with_gradients)
