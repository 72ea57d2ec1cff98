"""Small cases for pytest-benchmark: `python -m pytest bench --benchmark-enable`. Not part of the test run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.attention import checks
from bench.attention.cases import Case, Shape, Unavailable
from bench.attention.contenders import NAMES, variants

CONTENDERS = [name for name in NAMES if name != "triton"]  # interpreted, it would take minutes


@pytest.fixture(scope="module", params=[64, 16], ids=lambda dim: f"d{dim}")
def case(request: pytest.FixtureRequest) -> Case:
    """14 + 431 tokens, 8 heads."""
    torch.set_num_threads(2)
    return Case(Shape(431, request.param, 1), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_attention(benchmark: Any, case: Case, name: str, backward: bool) -> None:
    try:
        variant = next(variants(name, case, backward))
    except Unavailable as reason:
        pytest.skip(str(reason))
    tensors = case.inputs(variant.layout, backward)[0]
    assert checks.check(variant, case, backward, checks.oracle(case, backward, variant.masked))[1] is None
    with torch.set_grad_enabled(backward):
        benchmark(variant.run, tensors)
