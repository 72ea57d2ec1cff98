"""Schema and shape rules of the row norm; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.fused.normalize.configs import NormalizeConfig, problem

NAMESPACE = "fastmetro_kernels"
MAX_WIDTH = 16384
"""Numbers of a row, which a program holds in registers."""

# `marks`: so many columns behind the rows, 1 in the one of the row's place in its sample; `config` is a
# NormalizeConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::normalize_rows_triton",
    "(Tensor x, Tensor? shift, float epsilon, int marks, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(x: Tensor, shift: Tensor | None, marks: int, config: Sequence[int]) -> None:
    """Shape and dtype rules of the op, in a form that tracing understands."""
    torch._check(x.dim() == 3, lambda: f"x must be [B, M, K], got {tuple(x.shape)}")
    torch._check(x.dtype != torch.float64, lambda: "normalize_rows_triton does not take float64")
    torch._check(0 < x.size(2) <= MAX_WIDTH, lambda: f"x must have 1 to {MAX_WIDTH} features, got {x.size(2)}")
    if shift is not None:
        fits = shift.shape == x.shape[2:] and shift.dtype == torch.float32 and shift.is_contiguous()
        torch._check(fits, lambda: f"shift must be float32 [{x.size(2)}], contiguous, got {tuple(shift.shape)}")
    torch._check(marks == 0 or marks >= x.size(1), lambda: f"marks must be 0 or at least {x.size(1)}, got {marks}")
    if config:
        found = problem(NormalizeConfig(*config)) if len(config) == 2 else f"two numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::normalize_rows_triton")
def _fake(x: Tensor, shift: Tensor | None, epsilon: float, marks: int, config: Sequence[int]) -> Tensor:
    check_arguments(x, shift, marks, config)
    return x.new_empty((*x.shape[:2], x.size(2) + marks))


def _normalize_rows_triton(
    x: Tensor, shift: Tensor | None, epsilon: float, marks: int, config: Sequence[int]
) -> Tensor:
    from fastmetro_kernels.fused.normalize import triton

    return triton.normalize(x, shift, epsilon, marks, config)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::normalize_rows_triton", _device, _normalize_rows_triton)

normalize_rows_triton = torch.ops.fastmetro_kernels.normalize_rows_triton.default
