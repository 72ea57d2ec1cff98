"""Schema and shape rules of the decoder tail; ``triton.py``, imported by the first call, implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels.fused.decoder_tail.configs import MAX_FEATURES, TailConfig, problem
from fastmetro_kernels.fused.decoder_tail.weights import TailWeights
from fastmetro_kernels.fused.short_attention.configs import MAX_KEYS

NAMESPACE = "fastmetro_kernels"

# `weights` are those of TailWeights, in order; `config` is a TailConfig, or empty for the pinned one.
torch.library.define(
    f"{NAMESPACE}::decoder_tail_triton",
    "(Tensor tokens, Tensor attended, Tensor k, Tensor v, Tensor[] weights, float scale, float cross_epsilon, "
    "float feed_forward_epsilon, bool constant_weights, int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], config: Sequence[int]
) -> None:
    """Shape, dtype and device rules of the op, in a form that tracing understands."""
    torch._check(tokens.dim() == 3, lambda: f"tokens must be [B, L, C], got {tuple(tokens.shape)}")
    torch._check(tokens.dtype != torch.float64, lambda: "decoder_tail_triton does not take float64")
    batch, _, width = tokens.shape
    torch._check(1 <= width <= MAX_FEATURES, lambda: f"tokens have 1 to {MAX_FEATURES} features, got {width}")
    torch._check(attended.shape == tokens.shape, lambda: f"attended must be {tuple(tokens.shape)}")
    torch._check(k.dim() == 4, lambda: f"k must be [B, S, H, D], got {tuple(k.shape)}")
    keys, heads, dim = k.shape[1:]
    torch._check(
        k.size(0) == batch and heads * dim == width and 1 <= keys <= MAX_KEYS,
        lambda: f"k must be [{batch}, S, H, D] with H D = {width} and S from 1 to {MAX_KEYS}, got {tuple(k.shape)}",
    )
    torch._check(v.shape == k.shape, lambda: f"v must be {tuple(k.shape)} like k, got {tuple(v.shape)}")
    torch._check(len(weights) == len(TailWeights._fields), lambda: f"weights must be ten tensors, got {len(weights)}")
    found = TailWeights(*weights)
    for (name, shape), tensor in zip(found.shapes().items(), found, strict=True):
        torch._check(
            tuple(tensor.shape) == shape and tensor.is_contiguous(),
            lambda name=name, shape=shape: f"{name} must be {shape}, contiguous",
        )
    torch._check(found.out_weight.size(0) == width, lambda: f"weights must have {width} features")
    for tensor in (attended, k, v, *weights):
        torch._check(tensor.dtype == tokens.dtype, lambda: f"all tensors must be {tokens.dtype} like tokens")
        torch._check(tensor.device == tokens.device, lambda: f"all tensors must be on {tokens.device} like tokens")
    if config:
        whole = len(config) == len(TailConfig._fields)
        problem_found = problem(TailConfig(*config)) if whole else f"must be a TailConfig, got {list(config)}"
        torch._check(problem_found is None, lambda: f"config: {problem_found}")


@torch.library.register_fake(f"{NAMESPACE}::decoder_tail_triton")
def _fake(tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], *options: Any) -> Tensor:
    check_arguments(tokens, attended, k, v, weights, options[-1])
    return tokens.new_empty(tuple(tokens.shape))


def _decoder_tail_triton(*arguments: Any) -> Tensor:
    from fastmetro_kernels.fused.decoder_tail import triton

    return triton.tail(*arguments)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::decoder_tail_triton", _device, _decoder_tail_triton)

decoder_tail_triton = torch.ops.fastmetro_kernels.decoder_tail_triton.default
