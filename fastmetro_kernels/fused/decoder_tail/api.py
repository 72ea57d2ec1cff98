"""The public op: checks and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.fused.decoder_tail import native, ops, reference
from fastmetro_kernels.fused.decoder_tail.configs import MAX_FEATURES, TailConfig, problem
from fastmetro_kernels.fused.decoder_tail.weights import TailWeights
from fastmetro_kernels.fused.inference import (
    DTYPES,
    backend_reasons,
    check_config,
    check_epsilon,
    check_tensor,
    choose_backend,
    refuse_gradients,
)
from fastmetro_kernels.fused.short_attention.api import score_factor
from fastmetro_kernels.fused.short_attention.configs import MAX_KEYS


def decoder_tail(
    tokens: Tensor,
    attended: Tensor,
    k: Tensor,
    v: Tensor,
    weights: TailWeights,
    *,
    cross_epsilon: float = 1e-5,
    feed_forward_epsilon: float = 1e-5,
    scale: float | None = None,
    constant_weights: bool = False,
    config: TailConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """Everything of a narrow pre-norm decoder layer behind its self-attention, in one launch::

        x = tokens + attended @ out_weight.T + out_bias
        q = norm(x) @ query_weight.T + query_bias
        x = x + softmax(scale q k^T) v @ cross_weight.T + cross_bias
        x = x + relu(norm(x) @ expand_weight.T + expand_bias) @ contract_weight.T + contract_bias

    For inference: it has no gradients. In FastMETRO (ECCV 2022, section 3.2) these are the layers of the second stage:
    128 features, 8 heads, 512 hidden features. The layer norms have no gain and shift: fold them into the weights
    behind them. x is kept in float32 (float64 for float64 tokens), but for one rounding to the dtype of tokens in front
    of the cross-attention on Triton; what is multiplied is rounded to that dtype, too. Sums are taken in a fixed order:
    equal calls give equal bits. Autocast changes nothing.

    Args:
        tokens: ``[B, L, C]``, C from 1 to 128; float32, float16, bfloat16 or (reference) float64; any strides.
        attended: ``[B, L, C]``, of the self-attention, heads side by side.
        k, v: ``[B, S, H, D]`` with H D = C, S from 1 to 128; any strides, so that they may be slices of a projection.
        weights: contiguous, in the dtype of tokens.
        cross_epsilon, feed_forward_epsilon: of the layer norms in front of the query and of the feed-forward block.
        scale: Factor of the scores, finite; 1 / sqrt(D) by default.
        constant_weights: A promise that the kernel launched right before this one in the stream writes no weights. On
            Hopper the first of them are then read while that kernel still runs.
        config: The tile of the Triton kernel instead of the pinned one, for measurements; ``"auto"`` then leaves out
            native.
        backend: ``"native"`` (half precision, 8 heads of 16 features, up to 64 keys and hidden features in multiples of
            64 on compute capability 9.0), ``"triton"``, ``"reference"`` or ``"auto"``: on a GPU in half precision
            native where it can take the call, else Triton; else the reference.

    Returns:
        ``[B, L, C]`` in the dtype of tokens, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    if not isinstance(weights, TailWeights):
        raise TypeError(f"weights must be TailWeights, got {type(weights).__name__}")
    check_tensor("tokens", tokens, DTYPES)
    given = {"attended": attended, "k": k, "v": v} | weights._asdict()
    for name, tensor in given.items():
        check_tensor(name, tensor, (tokens.dtype,), tokens.device)
    _check_shapes(tokens, attended, k, v, weights)
    for name, value in (("cross_epsilon", cross_epsilon), ("feed_forward_epsilon", feed_forward_epsilon)):
        check_epsilon(name, value)
    check_config(config, TailConfig, problem)
    factor = score_factor(scale, k.shape[3])
    refuse_gradients("decoder_tail", {"tokens": tokens} | given)
    options = (factor, cross_epsilon, feed_forward_epsilon)
    if config is not None and backend == "native":
        raise ValueError("config is of the Triton kernel, and backend is 'native'")
    chosen = _choose(tokens, attended, k, v, weights, backend, tiled=config is not None)
    if chosen == "reference":
        return reference.tail(tokens, attended, k, v, weights, *options)
    if chosen == "native":
        early = True  # everything that the kernel runs on starts early
        return native.decoder_tail_native(tokens, attended, k, v, *weights, *options, constant_weights, early)
    return ops.decoder_tail_triton(tokens, attended, k, v, list(weights), *options, constant_weights, config or ())


def _choose(
    tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: TailWeights, backend: str, tiled: bool
) -> str:
    """The backend that runs a call, for which a tile of the Triton kernel was given or not; errors as of
    `decoder_tail`."""
    if backend == "auto" and tokens.is_cuda:
        if tokens.dtype == torch.float32:
            return "reference"  # without tensor cores a program's registers do not suffice: the Triton kernel spills
        if not tiled and not native.reasons(tokens, attended, k, v, weights):
            return "native"
    if backend in ("auto", "triton", "reference"):
        return choose_backend("decoder_tail", backend, tokens.device, tokens.dtype)
    reasons = backend_reasons(tokens.device, tokens.dtype)
    return backends.select(
        "decoder_tail", backend, reasons | {"native": native.reasons(tokens, attended, k, v, weights)}, ()
    )


def _check_shapes(tokens: Tensor, attended: Tensor, k: Tensor, v: Tensor, weights: TailWeights) -> None:
    if tokens.dim() != 3 or not 1 <= tokens.shape[2] <= MAX_FEATURES:
        raise ValueError(f"tokens must be [B, L, C] with C from 1 to {MAX_FEATURES}, got {list(tokens.shape)}")
    batch, _, width = tokens.shape
    if attended.shape != tokens.shape:
        raise ValueError(f"attended must be {list(tokens.shape)} like tokens, got {list(attended.shape)}")
    keys = k.shape[1] if k.dim() == 4 else 0
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2] * k.shape[3] != width or not 1 <= keys <= MAX_KEYS:
        accepted = f"[{batch}, S, H, D] with H D = {width} and S from 1 to {MAX_KEYS}"
        raise ValueError(f"k must be {accepted}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must be {list(k.shape)} like k, got {list(v.shape)}")
    if weights.out_weight.dim() != 2 or weights.out_weight.shape[0] != width:
        raise ValueError(f"out_weight must be [{width}, {width}], got {list(weights.out_weight.shape)}")
    if weights.expand_weight.dim() != 2:
        raise ValueError(f"expand_weight must be [F, {width}], got {list(weights.expand_weight.shape)}")
    for (name, shape), tensor in zip(weights.shapes().items(), weights, strict=True):
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {list(shape)}, contiguous, got {list(tensor.shape)}")
