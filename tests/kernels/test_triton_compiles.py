"""Every Triton attention kernel compiles to machine code for NVIDIA GPUs, also on a machine without one."""

from __future__ import annotations

import pytest
from compilation import SHARED_LIMIT, compile_report, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(
    "capability, dtype, dim, flags",
    [
        (90, "fp16", 64, ()),
        (90, "fp16", 16, ("long_lists",)),
        (90, "bf16", 128, ("dropout",)),
        (90, "fp32", 64, ("dropout", "long_lists")),
        (90, "fp32", 32, ("tf32x3",)),
        (80, "bf16", 24, ("strided", "ones")),
        (80, "fp16", 64, ("long_lists", "forward:64x128x4x2", "rows:64x64x4x2", "columns:32x64x4x2")),
        (90, "fp16", 64, ("dropout", "forward:64x128x4x2", "rows:64x64x4x2", "columns:32x64x4x2")),
        (90, "fp16", 16, ("long_lists", "forward:32x64x2x2", "rows:32x64x2x2", "columns:32x64x2x2")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_kernels_compile_without_spilling(capability: int, dtype: str, dim: int, flags: tuple[str, ...]) -> None:
    report = compile_report("compile_attention.py", capability, dtype, dim, *flags)
    assert len(report) == (3 if "ones" in flags or any(":" in flag for flag in flags) else 5)
    for name, used in report.items():
        assert used["stack"] <= 16, (name, used)
        assert used["shared"] <= SHARED_LIMIT[capability], (name, used)
