"""The public op: checks, the choice of a backend, and the axes before the last two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.fused.inference import DTYPES, check_tensor, choose_backend, refuse_gradients
from fastmetro_kernels.fused.linear import ops, reference
from fastmetro_kernels.fused.linear.configs import LinearConfig, problem


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalize: float | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    constant_weights: bool = False,
    config: LinearConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with what surrounds it in a pre-norm transformer: ``act(norm(x) @ weight.T + bias) + residual``.

    For inference: it has no gradients. One launch on Triton. Sums are taken in float32 (float64 for float64 ``x``) in
    a fixed order: equal calls give equal bits. The layer norm (Ba et al. 2016) has no gain and shift of its own: fold
    them into weight and bias, ``weight * gain`` and ``bias + weight @ shift``. Normalised rows are rounded to the dtype
    of ``x`` before they are multiplied. Autocast changes nothing.

    Args:
        x: ``[..., M, K]``: M tokens of K features; float32, float16, bfloat16 or (reference) float64. Any strides, also
            a slice of the tokens or a batch stride of 0; only several leading axes that cannot be seen as one axis are
            copied.
        weight: ``[N, K]`` in the dtype of x, any strides.
        bias: ``[N]``, or ``[M, N]`` for a bias per token (position terms folded into a projection); any dtype of x's.
        normalize: Epsilon (at least 0) of a layer norm of the rows of x; None for none.
        residual: ``[..., M, N]``, or ``[M, N]`` shared by all samples; any dtype of x's, any strides.
        relu: Whether negative numbers become 0, before the residual is added.
        out_dtype: Of the result; that of x by default.
        constant_weights: A promise that the kernel launched right before this one in the stream writes neither weight
            nor bias. On Hopper they are then read while that kernel still runs.
        config: The tile configuration of the Triton kernel instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        ``[..., M, N]``, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    _check_tensors(x, weight, bias, residual)
    _check_shapes(x, weight, bias, residual)
    accepted = DTYPES if x.dtype == torch.float64 else DTYPES[:3]
    _check_options(normalize, relu, out_dtype, accepted, config)
    refuse_gradients("fused_linear", {"x": x, "weight": weight, "bias": bias, "residual": residual})
    chosen = choose_backend("fused_linear", backend, x.device, x.dtype)
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None:
        residual = _as_batch(residual.expand(shape))
    x, dtype = _as_batch(x), x.dtype if out_dtype is None else out_dtype
    if chosen == "reference":
        out = reference.linear(x, weight, bias, residual, normalize, relu, dtype)
    else:
        options = (dtype, constant_weights, config or ())
        out = ops.fused_linear_triton(x, weight, bias, residual, normalize, relu, *options)
    return out.view(shape)


def _as_batch(x: Tensor) -> Tensor:
    """The leading axes as one."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_tensor("x", x, DTYPES)
    check_tensor("weight", weight, (x.dtype,), x.device)
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None:
            check_tensor(name, tensor, DTYPES if x.dtype == torch.float64 else DTYPES[:3], x.device)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., M, K] with K of at least 1, got {list(x.shape)}")
    tokens, width = x.shape[-2:]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight must be [N, {width}] for x of {list(x.shape)}, got {list(weight.shape)}")
    features = weight.shape[0]
    if bias is not None and tuple(bias.shape) not in {(features,), (tokens, features)}:
        raise ValueError(f"bias must be [{features}] or [{tokens}, {features}], got {list(bias.shape)}")
    if residual is not None and tuple(residual.shape) not in {(*x.shape[:-1], features), (tokens, features)}:
        accepted = f"{[*x.shape[:-1], features]} or [{tokens}, {features}]"
        raise ValueError(f"residual must be {accepted}, got {list(residual.shape)}")


def _check_options(
    normalize: float | None,
    relu: bool,
    out_dtype: torch.dtype | None,
    out_dtypes: Sequence[torch.dtype],
    config: LinearConfig | None,
) -> None:
    if normalize is not None:
        if isinstance(normalize, bool) or not isinstance(normalize, (int, float)):
            raise TypeError(f"normalize must be the epsilon of a layer norm or None, got {normalize!r}")
        if not (math.isfinite(normalize) and normalize >= 0):
            raise ValueError(f"normalize must be a finite epsilon of at least 0, got {normalize}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be True or False, got {relu!r}")
    if out_dtype is not None and out_dtype not in out_dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in out_dtypes)
        raise TypeError(f"out_dtype must be one of {accepted}, got {out_dtype}")
    if config is not None:
        if not isinstance(config, LinearConfig):
            raise TypeError(f"config must be a LinearConfig, got {type(config).__name__}")
        if found := problem(config):
            raise ValueError(f"config: {found}")
