"""The public op: checks and the choice of a backend."""

from __future__ import annotations

from torch import Tensor

from fastmetro_kernels.fused.cross_attention_block import ops, reference
from fastmetro_kernels.fused.cross_attention_block.configs import MAX_FEATURES, BlockConfig, problem
from fastmetro_kernels.fused.inference import DTYPES, check_tensor, choose_backend, refuse_gradients
from fastmetro_kernels.fused.short_attention.api import check_inputs, score_factor


def cross_attention_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    scale: float | None = None,
    constant_weights: bool = False,
    config: BlockConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense attention over at most 128 keys with its projection: softmax(scale q k^T) v @ weight.T + bias + residual.

    For inference: it has no gradients. The same as `short_attention` followed by `fused_linear`, in one launch on
    Triton; for narrow layers, since a program makes whole rows of the output (FastMETRO's second stage, ECCV 2022,
    section 3.2: 8 heads of 16, 128 features). Accumulates in float32 (float64 for float64 inputs) in a fixed order:
    equal calls give equal bits. What attention gives is rounded to the dtype of q in front of the projection. Autocast
    changes nothing.

    Args:
        q: ``[B, L, H, D]`` float32, float16, bfloat16 or (reference) float64; any strides, also a batch stride of 0.
        k, v: ``[B, S, H, D]`` in the dtype of q, S from 1 to 128, D from 1 to 128; any strides.
        weight: ``[N, H D]`` in the dtype of q, N from 1 to 128, any strides.
        bias: ``[N]``, any dtype of q's.
        residual: ``[B, L, N]``, or ``[L, N]`` shared by all samples; any dtype of q's, any strides.
        scale: Factor of the scores, finite; 1 / sqrt(D) by default.
        constant_weights: A promise that the kernel launched right before this one in the stream writes neither weight
            nor bias. On Hopper they are then fetched while that kernel still runs.
        config: The tile configuration of the Triton kernel instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, L, N]`` in the dtype of q, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    check_inputs(q, k, v)
    _check_projection(q, weight, bias, residual)
    if config is not None:
        if not isinstance(config, BlockConfig):
            raise TypeError(f"config must be a BlockConfig, got {type(config).__name__}")
        if found := problem(config):
            raise ValueError(f"config: {found}")
    factor = score_factor(scale, q.shape[3])
    tensors = {"q": q, "k": k, "v": v, "weight": weight, "bias": bias, "residual": residual}
    refuse_gradients("cross_attention_block", tensors)
    chosen = choose_backend("cross_attention_block", backend, q.device, q.dtype)
    if residual is not None:
        residual = residual.expand(*q.shape[:2], weight.shape[0])
    if chosen == "reference":
        return reference.block(q, k, v, weight, bias, residual, factor)
    return ops.cross_attention_block_triton(q, k, v, weight, bias, residual, factor, constant_weights, config or ())


def _check_projection(q: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_tensor("weight", weight, (q.dtype,), q.device)
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None:
            check_tensor(name, tensor, DTYPES if q.dtype == DTYPES[-1] else DTYPES[:-1], q.device)
    batch, queries, heads, dim = q.shape
    if weight.dim() != 2 or weight.shape[1] != heads * dim or not 1 <= weight.shape[0] <= MAX_FEATURES:
        accepted = f"[N, {heads * dim}] with N from 1 to {MAX_FEATURES}"
        raise ValueError(f"weight must be {accepted} for q of {list(q.shape)}, got {list(weight.shape)}")
    features = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (features,):
        raise ValueError(f"bias must be [{features}], got {list(bias.shape)}")
    if residual is not None and tuple(residual.shape) not in {(batch, queries, features), (queries, features)}:
        accepted = f"[{batch}, {queries}, {features}] or [{queries}, {features}]"
        raise ValueError(f"residual must be {accepted}, got {list(residual.shape)}")
