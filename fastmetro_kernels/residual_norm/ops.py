"""Schemas and shape rules of the residual norm's ops; ``triton.py``, imported by the first call, implements them.

They carry no autograd formula of their own; ``api.py`` adds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.dropout.ops import check_seed
from fastmetro_kernels.residual_norm.plan import WIDEST, ResidualNormConfig, problem

NAMESPACE = "fastmetro_kernels"

# The new stream (empty without a branch: it is the stream), its norm, and of its rows the mean and one over the
# deviation. `branch_bias` only with a branch. `seed` is one int64, or None where nothing is dropped; `config` is a
# ResidualNormConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::residual_norm_triton",
    "(Tensor stream, Tensor? branch, Tensor weight, Tensor bias, Tensor? branch_bias, Tensor? seed, float dropout_p, "
    "float epsilon, ScalarType dtype, int[] config) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Gradients of the stream, the branch, the weight, the bias and the branch's bias of those of the norm (`grad`) and of
# x, the new stream (`more`): one of them at least. That of the branch is empty where no dtype of it is given, or where
# nothing is dropped and it has the stream's: it is then that of the stream. That of its bias is empty unless `biased`.
torch.library.define(
    f"{NAMESPACE}::residual_norm_backward_triton",
    "(Tensor? grad, Tensor? more, Tensor x, Tensor weight, Tensor mean, Tensor inverse, Tensor? seed, "
    "float dropout_p, ScalarType stream_dtype, ScalarType? branch_dtype, bool biased, int[] config) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_tile(config: Sequence[int]) -> None:
    """Of both ops."""
    if config:
        known = len(config) == 3
        found = problem(ResidualNormConfig(*config)) if known else f"three numbers, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


def _check_rows(tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        torch._check(tensor.dim() >= 1, lambda: f"{name} must be [..., C], got {tuple(tensor.shape)}")  # noqa: B023
        torch._check(tensor.dtype != torch.float64, lambda: "residual_norm_triton does not take float64")
        torch._check(tensor.is_contiguous(), lambda: f"{name} must be contiguous")  # noqa: B023


def _check_vectors(width: int, vectors: dict[str, Tensor | None]) -> None:
    torch._check(width <= WIDEST, lambda: f"rows may have {WIDEST} numbers, got {width}")
    for name, vector in vectors.items():
        if vector is None:
            continue
        fits = vector.shape == (width,) and vector.dtype == torch.float32 and vector.is_contiguous()
        torch._check(fits, lambda: f"{name} must be float32 [{width}], contiguous")  # noqa: B023


def check_forward(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """All rules of the forward op."""
    _check_rows({"stream": stream, "branch": branch})
    _check_vectors(stream.size(-1), {"weight": weight, "bias": bias, "branch_bias": branch_bias})
    torch._check(branch is not None or branch_bias is None, lambda: "branch_bias must come with a branch")
    check_seed(seed)
    if branch is not None:
        fits = stream.shape == branch.shape or (
            stream.dim() == branch.dim() and stream.size(0) == 1 and stream.shape[1:] == branch.shape[1:]
        )
        torch._check(fits, lambda: f"stream must be {tuple(branch.shape)} or one of it, got {tuple(stream.shape)}")


def check_backward(
    grad: Tensor | None, more: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """All rules of the backward op."""
    torch._check(grad is not None or more is not None, lambda: "grad or more must be given")
    tensors = {"x": x, "grad": grad, "more": more}
    _check_rows(tensors)
    for name, tensor in tensors.items():
        if tensor is not None:
            torch._check(tensor.shape == x.shape, lambda: f"{name} must be {tuple(x.shape)}")  # noqa: B023
    _check_vectors(x.size(-1), {"weight": weight})
    for name, tensor in (("mean", mean), ("inverse", inverse)):
        fits = tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == x.shape[:-1]
        torch._check(fits, lambda: f"{name} must be float32 {tuple(x.shape[:-1])}, contiguous")  # noqa: B023
    check_seed(seed)


def empty_results(stream: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what the forward op returns."""
    like = stream if branch is None else branch
    new_stream = stream.new_empty(0)
    if branch is not None:
        new_stream = torch.empty_like(branch, dtype=torch.promote_types(stream.dtype, branch.dtype))
    mean = like.new_empty(like.shape[:-1], dtype=torch.float32)
    return new_stream, torch.empty_like(like, dtype=dtype), mean, torch.empty_like(mean)


def writes_branch(seed: Tensor | None, stream_dtype: torch.dtype, branch_dtype: torch.dtype | None) -> bool:
    """Whether the gradient of the branch is another tensor than that of the stream."""
    return branch_dtype is not None and (seed is not None or branch_dtype != stream_dtype)


def empty_gradients(
    x: Tensor, weight: Tensor, seed: Tensor | None, stream_dtype: torch.dtype, branch_dtype: torch.dtype | None,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for what the backward op returns."""
    grad_branch = x.new_empty(0)
    if branch_dtype is not None and writes_branch(seed, stream_dtype, branch_dtype):
        grad_branch = torch.empty_like(x, dtype=branch_dtype)
    grad_branch_bias = torch.empty_like(weight) if biased else weight.new_empty(0)
    grad_stream = torch.empty_like(x, dtype=stream_dtype)
    return grad_stream, grad_branch, torch.empty_like(weight), torch.empty_like(weight), grad_branch_bias


@torch.library.register_fake(f"{NAMESPACE}::residual_norm_triton")
def _fake(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, epsilon: float, dtype: torch.dtype, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_tile(config)
    check_forward(stream, branch, weight, bias, branch_bias, seed)
    return empty_results(stream, branch, dtype)


@torch.library.register_fake(f"{NAMESPACE}::residual_norm_backward_triton")
def _fake_backward(
    grad: Tensor | None, more: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor,
    seed: Tensor | None, dropout_p: float, stream_dtype: torch.dtype, branch_dtype: torch.dtype | None, biased: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_tile(config)
    check_backward(grad, more, x, weight, mean, inverse, seed)
    return empty_gradients(x, weight, seed, stream_dtype, branch_dtype, biased)


def _forward(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, epsilon: float, dtype: torch.dtype, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastmetro_kernels.residual_norm import triton

    return triton.forward(stream, branch, weight, bias, branch_bias, seed, dropout_p, epsilon, dtype, config)


def _backward(
    grad: Tensor | None, more: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor,
    seed: Tensor | None, dropout_p: float, stream_dtype: torch.dtype, branch_dtype: torch.dtype | None, biased: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastmetro_kernels.residual_norm import triton

    return triton.backward(
        grad, more, x, weight, mean, inverse, seed, dropout_p, stream_dtype, branch_dtype, biased, config
    )  # fmt: skip


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::residual_norm_triton", _device, _forward)
    torch.library.impl(f"{NAMESPACE}::residual_norm_backward_triton", _device, _backward)

residual_norm_triton = torch.ops.fastmetro_kernels.residual_norm_triton.default
residual_norm_backward_triton = torch.ops.fastmetro_kernels.residual_norm_backward_triton.default
