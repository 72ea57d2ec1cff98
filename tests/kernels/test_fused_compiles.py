"""The fused Triton kernels compile to machine code for NVIDIA GPUs, also on a machine without one."""

from __future__ import annotations

import pytest
from compilation import SHARED_LIMIT, compile_report, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(("capability", "dtype", "width"), [(90, "fp16", 512), (90, "fp16", 128), (80, "bf16", 128)])
def test_pinned_tiles_compile_without_spilling(capability: int, dtype: str, width: int) -> None:
    found = compile_report("compile_fused.py", capability, dtype, width)
    kinds = {"linear", "attention", "norm"} | ({"tail", "pixels", "order", "crops"} if width == 128 else set())
    assert {name.split()[0] for name in found} == kinds
    for name, used in found.items():
        kind = name.split()[0]
        # The fastest tile of the tail keeps some words of its 64 x 128 sums in memory.
        assert used["stack"] <= (64 if kind == "tail" else 16), (name, used)
        assert used["shared"] <= SHARED_LIMIT[capability], (name, used)
        assert used["tensor_cores"] == (dtype != "fp32" and kind in {"linear", "attention", "tail"}), (name, used)
        early = capability >= 90 and kind != "crops"
        assert used["waits"] == early, (name, used)
        if early:  # the weights, which the caller promises to be constant, come before the wait
            assert used["reads_early"] == (kind in {"linear", "tail"}), (name, used)
