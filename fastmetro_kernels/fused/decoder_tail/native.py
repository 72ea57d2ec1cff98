"""The native backend of the decoder tail: half precision, compute capability 9.0 (``csrc/decoder_tail/``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.fused.decoder_tail.ops import NAMESPACE
from fastmetro_kernels.fused.decoder_tail.weights import TailWeights
from fastmetro_kernels.fused.inference import aligned

OPERATOR = "decoder_tail_native"
WIDTH, HEADS, MAX_KEYS, DEPTH = 128, 8, 64, 64

torch.library.define(
    f"{NAMESPACE}::{OPERATOR}",
    "(Tensor tokens, Tensor attended, Tensor k, Tensor v, "
    + ", ".join(f"Tensor {name}" for name in TailWeights._fields)
    + ", float scale, float cross_epsilon, float feed_forward_epsilon, bool constant_weights, bool early) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{NAMESPACE}::{OPERATOR}")
def _fake(tokens: Tensor, *others: object) -> Tensor:
    torch._check(
        tokens.dim() == 3 and tokens.size(2) == WIDTH, lambda: f"tokens must be [B, L, 128], got {tuple(tokens.shape)}"
    )
    return tokens.new_empty(tuple(tokens.shape))


def reasons(tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: TailWeights) -> list[str]:
    """Why the kernel cannot take a call whose shapes fit; empty when it can."""
    found = list(_device_reasons(tokens.device, tokens.dtype))
    keys, heads, dim = k.shape[1:]
    if (heads, heads * dim) != (HEADS, WIDTH):
        found.append(f"takes {HEADS} heads of {WIDTH // HEADS} features, got {heads} of {dim}")
    if keys > MAX_KEYS:
        found.append(f"takes up to {MAX_KEYS} keys, got {keys}")
    if (hidden := len(weights.expand_weight)) % DEPTH:
        found.append(f"takes hidden features in multiples of {DEPTH}, got {hidden}")
    for names, rows, words in ((("tokens", "attended"), (tokens, attended), 2), (("k", "v"), (k, v), 8)):
        for name, tensor in zip(names, rows, strict=True):
            if not _rows_fit(tensor, words):
                found.append(f"rows of {name} must lie whole in memory and begin at a multiple of {2 * words} bytes")
    for name, tensor in weights._asdict().items():
        if not aligned(tensor, 16):
            found.append(f"{name} must be aligned to 16 bytes")
    return found


def _rows_fit(tensor: Tensor, words: int) -> bool:
    """Whether the last dimensions lie beside each other, and rows begin at a multiple of so many 16-bit words."""
    strides, sizes = tensor.stride(), tensor.shape
    beside = strides[-1] == 1 and (tensor.dim() == 3 or strides[2] == sizes[3])
    steps = [stride for stride, size in zip(strides[:2], sizes[:2], strict=True) if size > 1]
    return beside and aligned(tensor, 2 * words) and all(step % words == 0 for step in steps)


@assumed_constant
def _device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return backends.hopper_reasons(OPERATOR, device, dtype)


decoder_tail_native = torch.ops.fastmetro_kernels.decoder_tail_native.default
