"""`topology_attention`: checks its input, picks a backend, and joins the ops to autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels.attention import dispatch, reference
from fastmetro_kernels.attention.dispatch import Choice
from fastmetro_kernels.attention.ops import lse_dtype
from fastmetro_kernels.attention.weights import SparseAttentionWeights, attention_weights
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.seeds import check_probability, seed_tensor
from fastmetro_kernels.topology import TokenTopology

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def topology_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topology: TokenTopology,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention in which hub tokens see all, and vertices see the hubs and their mesh neighbours.

    The same as `scaled_dot_product_attention` with the mask `topology.mask()` (True where a query may attend), but
    only allowed pairs are computed: softmax(scale q.k) v of Vaswani et al. 2017, equation 1, with the attention
    mask of FastMETRO (Cho et al., ECCV 2022, section 3.3). A query with no allowed key (an isolated vertex where
    there are no hubs) gives 0, and -inf as log-sum-exp. Accumulates in float32 (float64 for float64 inputs).
    Under autocast q, k and v are cast to the autocast dtype, as `scaled_dot_product_attention` does.

    Args:
        q, k, v: [B, L, H, D], tokens hubs first, L = `topology.num_tokens`; float32, float16, bfloat16 or (reference
            and native on the CPU) float64; any strides, also a batch stride of 0.
        topology: The pattern, on the device of q.
        scale: Factor of the scores, finite, also 0 or negative; 1 / sqrt(D) by default.
        dropout_p: Probability in [0, 1) of dropping a weight after the softmax; kept ones are divided by
            1 - dropout_p.
        seed: Of the dropout mask: an integer, an int64 tensor of one element on the device of q, or None to
            draw one from PyTorch's generator. The same seed gives the same mask on every backend.
        return_weights: Also return the `SparseAttentionWeights` (after dropout, differentiable).
        return_lse: Also return log(sum(exp(scale q.k))) over the allowed keys, before dropout (differentiable).
        backend: `"auto"` (in each pass the fastest that can, by measurement: see `explain`), `"reference"` (plain
            PyTorch, differentiable twice), `"native"` (the compiled extension) or `"triton"`.

    Returns:
        out, contiguous [B, L, H, D] in the dtype of q, or a tuple (out[, weights][, lse]) with lse [B, H, L]
        in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown `backend`.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    _check_types(q, k, v, topology)
    options = (topology, scale, dropout_p, seed, return_weights, return_lse, backend)
    if not _autocasts(q.device.type):
        return _attend(q, k, v, *options)
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return _attend(q, k, v, *options)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topology: TokenTopology,
    scale: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    return_weights: bool,
    return_lse: bool,
    backend: str,
) -> Any:
    """`topology_attention` without autocast."""
    _check_inputs(q, k, v, topology)
    factor = _scale(scale, q)
    check_probability("dropout_p", dropout_p)
    drawn = seed_tensor(seed, dropout_p, q.device)
    forward, backward = dispatch.choose(backend, q, k, v, topology)
    if forward.backend == "reference":
        out, lse = reference.forward(q, k, v, topology, factor, dropout_p, drawn)
    else:
        out, lse = _Attention.apply(q, k, v, drawn, topology, factor, dropout_p, forward, backward)
    if not (return_weights or return_lse):
        return out
    results: list[Tensor | SparseAttentionWeights] = [out]
    if return_weights:
        results.append(attention_weights(q, k, lse, topology, factor, dropout_p, drawn))
    if return_lse:
        results.append(lse)
    return tuple(results)


class _Attention(torch.autograd.Function):
    """(out, lse) by the forward of a backend, gradients by the backward of the same or another one."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seed: Tensor | None,
        topology: TokenTopology,
        scale: float,
        dropout_p: float,
        forward: Choice,
        backward: Choice,
    ) -> tuple[Tensor, Tensor]:
        out, lse = dispatch.run(forward, "forward", q, k, v, topology, scale, dropout_p, seed)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.options = (topology, scale, dropout_p, backward)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = _AttentionBackward.apply(grad_out, grad_lse, q, k, v, out, lse, seed, *ctx.options)
        return *grads, None, None, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that differentiating them again gives a clear error."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        seed: Tensor | None,
        topology: TokenTopology,
        scale: float,
        dropout_p: float,
        choice: Choice,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.name = choice.backend
        saved = (q, k, v, out, lse)
        return dispatch.run(choice, "backward", grad_out, grad_lse, *saved, topology, scale, dropout_p, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f'topology_attention: backend="{ctx.name}" is differentiable once; for second derivatives use '
            'backend="reference"'
        )


def _check_types(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} must be one of {accepted}, got {tensor.dtype}")
    if not isinstance(topology, TokenTopology):
        raise TypeError(f"topology must be a TokenTopology, got {type(topology).__name__}")


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must be [B, L, H, D], got {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {tensor.dtype}")
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q {list(q.shape)}, got {list(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {tensor.device}")
    if q.shape[1] != topology.num_tokens:
        raise ValueError(
            f"q has {q.shape[1]} tokens, the topology has {topology.num_tokens} ({topology.num_hubs} hubs + "
            f"{topology.num_vertices} vertices)"
        )
    if q.shape[3] == 0:
        raise ValueError(f"q must have a head dim of at least 1, got {list(q.shape)}")
    if topology.columns.device != q.device:
        raise ValueError(
            f"topology must be on the device of q ({q.device}), got {topology.columns.device}; use topology.to()"
        )


@assumed_constant  # older versions of Dynamo cannot trace the query
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _autocasts(device: str) -> bool:
    """Whether autocast is on for the device (which not every device type knows)."""
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return 1.0 / math.sqrt(q.shape[3])
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    largest = torch.finfo(lse_dtype(q.dtype)).max / 2  # kernels multiply it by log2(e)
    if abs(scale) > largest:
        raise ValueError(f"scale must be at most {largest:.2g} in size for {q.dtype}, got {scale}")
    return float(scale)
