"""The public op: checks and the choice of a backend."""

from __future__ import annotations

import math

from torch import Tensor

from fastmetro_kernels.fused.inference import DTYPES, check_config, check_tensor, choose_backend, refuse_gradients
from fastmetro_kernels.fused.short_attention import ops, reference
from fastmetro_kernels.fused.short_attention.configs import MAX_DIM, MAX_KEYS, ShortAttentionConfig, problem


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    config: ShortAttentionConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense attention over at most 128 keys: softmax(scale q k^T) v of Vaswani et al. 2017, equation 1, without mask.

    For inference: it has no gradients. In FastMETRO (ECCV 2022, section 3.2) these are the encoder's self-attention
    among 50 tokens and the decoder's cross-attention to 49 image tokens. Accumulates in float32 (float64 for float64
    inputs) in a fixed order: equal calls give equal bits. Autocast changes nothing.

    Args:
        q: ``[B, L, H, D]`` float32, float16, bfloat16 or (reference) float64; any strides, also a batch stride of 0.
        k, v: ``[B, S, H, D]`` in the dtype of q, S from 1 to 128, D from 1 to 128; any strides, so that they may be
            slices of one wide projection.
        scale: Factor of the scores, finite; 1 / sqrt(D) by default.
        config: The tile configuration of the Triton kernel instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, L, H, D]`` in the dtype of q, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    check_inputs(q, k, v)
    check_config(config, ShortAttentionConfig, problem)
    factor = score_factor(scale, q.shape[3])
    refuse_gradients("short_attention", {"q": q, "k": k, "v": v})
    if choose_backend("short_attention", backend, q.device, q.dtype) == "reference":
        return reference.attention(q, k, v, factor)
    return ops.short_attention_triton(q, k, v, factor, config or ())


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, L, H, D] and k, v [B, S, H, D] as the op takes them.

    Raises:
        TypeError, ValueError: something does not fit; the message names it.
    """
    check_tensor("q", q, DTYPES)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), q.device)
    if q.dim() != 4 or not 1 <= q.shape[3] <= MAX_DIM:
        raise ValueError(f"q must be [B, L, H, D] with D from 1 to {MAX_DIM}, got {list(q.shape)}")
    batch, _, heads, dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, dim):
        raise ValueError(f"k must be [{batch}, S, {heads}, {dim}] for q of {list(q.shape)}, got {list(k.shape)}")
    if not 1 <= k.shape[1] <= MAX_KEYS:
        raise ValueError(f"k must have 1 to {MAX_KEYS} tokens, got {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {list(k.shape)}, got {list(v.shape)}")


def score_factor(scale: float | None, dim: int) -> float:
    """The scale, or 1 / sqrt(dim) where none is given.

    Raises:
        TypeError, ValueError: not a finite number.
    """
    if scale is None:
        return 1.0 / math.sqrt(dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)
