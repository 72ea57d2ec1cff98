"""Small cases for pytest-benchmark: `python -m pytest bench --benchmark-enable`. Not part of the test run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.upsampling.cases import PASSES, STEPS, Case, contenders, random_step
from fastmetro_kernels import SparseMatrix

NAMES = ("ours, auto", "ours, native", "ours, reference", "dense", "torch CSR", "loop over samples")


@pytest.fixture(scope="module", params=[1, 32], ids=lambda batch: f"batch{batch}")
def case(request: pytest.FixtureRequest) -> Case:
    """1,723 to 6,890 vertices x 3, random rows of three."""
    torch.set_num_threads(2)
    matrix = SparseMatrix.from_scipy(random_step(6890, 1723))
    return Case(f"random {STEPS[0]}", matrix, request.param, 3, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("which", PASSES[:2])
@pytest.mark.parametrize("name", NAMES)
def test_upsampling(benchmark: Any, case: Case, name: str, which: str) -> None:
    run, given = contenders(case, which, variants=False)[name], case.sets(which)[0]
    for got, exact in zip(run(*given), case.oracle(which, *given), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    benchmark(run, *given)
