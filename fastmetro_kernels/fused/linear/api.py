"""The public op: checks, the choice of a backend, and the axes before the last two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.fused.inference import (
    DTYPES,
    backend_reasons,
    check_config,
    check_epsilon,
    check_tensor,
    choose_backend,
    refuse_gradients,
)
from fastmetro_kernels.fused.linear import configs, native, ops, reference
from fastmetro_kernels.fused.linear.configs import LinearConfig
from fastmetro_kernels.fused.linear.native import Given, NativeLinearConfig


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalize: float | None = None,
    moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    residual: Tensor | None = None,
    leading: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    constant_weights: bool = False,
    config: LinearConfig | NativeLinearConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with what surrounds it in a pre-norm transformer: ``act(norm(x) @ weight.T + bias) + residual``.

    For inference: it has no gradients. One launch on Triton. Sums are taken in float32 (float64 for float64 ``x``) in
    a fixed order: equal calls give equal bits. The layer norm (Ba et al. 2016) has no gain and shift of its own: fold
    them into weight and bias, ``weight * gain`` and ``bias + weight @ shift``. Normalised rows are rounded to the dtype
    of ``x`` before they are multiplied, or with ``moments`` not at all. Autocast changes nothing.

    Args:
        x: ``[..., M, K]``: M tokens of K features; float32, float16, bfloat16 or (reference) float64. Any strides, also
            a slice of the tokens or a batch stride of 0; only several leading axes that cannot be seen as one axis are
            copied.
        weight: ``[N, K]`` in the dtype of x or in float32 (x is then multiplied in float32), any strides.
        bias: ``[N]``, or ``[M, N]`` for a bias per token (position terms folded into a projection); any dtype of x's.
        normalize: Epsilon (at least 0) of a layer norm of the rows of x; None for none.
        moments: ``[..., M, P, 3]`` float32: count, mean and squared distances from the mean of each row of x, for P
            parts of its features, as :func:`fused_linear_moments` gives them (also a slice of the tokens). With them
            the kernel multiplies x as it is and normalises the sums,
            ``(x @ weight.T - mean * weight_sums) / deviation``, which saves a pass over x. Digits are lost where a
            row's mean is thousands of times its deviation.
        weight_sums: ``[N]`` float32, ``weight.float().sum(1)``; together with moments.
        residual: ``[..., M, N]``, or ``[M, N]`` shared by all samples; any dtype of x's, any strides.
        leading: ``[..., P, N]``, or ``[P, N]`` shared by all samples: tokens that are put in front of each sample's, as
            they are (a class or camera token); any dtype of x's, any strides. Not together with a residual.
        relu: Whether negative numbers become 0, before the residual is added.
        out_dtype: Of the result; that of x by default.
        constant_weights: A promise that the kernel launched right before this one in the stream writes neither weight
            nor bias. On Hopper they are then read while that kernel still runs.
        config: The tile configuration of the Triton or the native kernel instead of the pinned one, for measurements.
        backend: ``"auto"`` (native where it was measured to be faster, else Triton where it can run on a GPU),
            ``"native"`` (few rows in half precision on compute capability 9.0), ``"triton"`` or ``"reference"``.

    Returns:
        ``[..., P + M, N]``, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    accepted = DTYPES if x.dtype == torch.float64 else DTYPES[:3]
    _check_options(normalize, relu, out_dtype, accepted, config)
    dtype = x.dtype if out_dtype is None else out_dtype
    options = (relu, dtype, False, constant_weights, config)
    tensors = _Tensors(x, weight, bias, residual, leading, moments, weight_sums)
    return _run(tensors, normalize, options, "fused_linear", backend)[0]


def fused_linear_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    leading: Tensor | None = None,
    constant_weights: bool = False,
    config: LinearConfig | NativeLinearConfig | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``x @ weight.T + bias + residual`` and its moments, for layers behind a layer norm of the result.

    What :func:`fused_linear` gives, and what its argument ``moments`` takes. Arguments and errors as there.

    Returns:
        ``[..., P + M, N]``, and float32 ``[..., P + M, parts, 3]``: count, mean and squared distances from the mean of
        the result's rows, as they were rounded, for parts of the features. How many parts is the kernel's affair.
    """
    _check_options(None, False, None, DTYPES, config)
    tensors = _Tensors(x, weight, bias, residual, leading, None, None)
    options = (False, x.dtype, True, constant_weights, config)
    return _run(tensors, None, options, "fused_linear_moments", backend)


class _Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    leading: Tensor | None
    moments: Tensor | None
    weight_sums: Tensor | None


def _run(
    tensors: _Tensors,
    normalize: float | None,
    options: tuple[bool, torch.dtype, bool, bool, LinearConfig | NativeLinearConfig | None],
    op: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Result and moments; the latter are empty where `options`, as of the op from relu on, do not ask for them."""
    x, weight, bias, residual, leading, moments, weight_sums = tensors
    _check_tensors(tensors)
    _check_shapes(tensors)
    _check_moments(tensors, normalize)
    refuse_gradients(op, tensors._asdict())
    relu, dtype, give_moments, constant_weights, config = options
    samples, features = x.shape[:-2], weight.shape[0]
    tokens = x.shape[-2] + (0 if leading is None else leading.shape[-2])
    residual, leading = _of_all_samples(residual, samples), _of_all_samples(leading, samples)
    x = _as_batch(x)
    if moments is not None:
        moments = moments.reshape(x.shape[0], *moments.shape[-3:])
    given = Given(x, weight, bias, residual, leading, normalize, moments, weight_sums, dtype)
    native_config = _native_config(op, given, config, backend)
    if native_config is not None:
        out, made = native.linear(given, relu, give_moments, constant_weights, native_config)
    elif choose_backend(op, backend, x.device, x.dtype) == "reference" or x.shape[1] == 0:
        out = reference.linear(x, weight, bias, residual, leading, normalize, relu, dtype)  # or only leading tokens
        made = reference.moments(out) if give_moments else out.new_empty((*out.shape[:2], 0, 3))
    else:
        tile = config if isinstance(config, LinearConfig) else ()
        rest = (relu, dtype, give_moments, constant_weights, tile)
        out, made = ops.fused_linear_triton(x, weight, bias, residual, leading, normalize, moments, weight_sums, *rest)
    return out.view(*samples, tokens, features), made.view(*samples, tokens, *made.shape[2:])


def _native_config(
    op: str, given: Given, config: LinearConfig | NativeLinearConfig | None, backend: str
) -> NativeLinearConfig | None:
    """The native kernel's tile, or None: the call is for another backend.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: the native kernel was asked for and cannot take the call.
    """
    named = isinstance(config, NativeLinearConfig)
    if backend == "auto" and not named:
        return native.choose(given) if config is None else None
    if backend in ("triton", "reference") and not named:
        return None
    chosen = config if isinstance(config, NativeLinearConfig) else native.choose(given) or native.plain(given)
    reasons = backend_reasons(given.x.device, given.x.dtype) | {"native": native.reasons(given, chosen)}
    backends.select(op, "native" if backend == "auto" else backend, reasons, ())
    return chosen


def _as_batch(x: Tensor) -> Tensor:
    """The leading axes as one."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _of_all_samples(tokens: Tensor | None, samples: torch.Size) -> Tensor | None:
    if tokens is None or tokens.shape[-2] == 0:
        return None
    return _as_batch(tokens.expand(*samples, *tokens.shape[-2:]))


def _check_tensors(tensors: _Tensors) -> None:
    x, weight = tensors.x, tensors.weight
    check_tensor("x", x, DTYPES)
    check_tensor("weight", weight, tuple(dict.fromkeys((x.dtype, torch.float32))), x.device)
    added = DTYPES if x.dtype == torch.float64 else DTYPES[:3]
    sums = (torch.promote_types(x.dtype, torch.float32),)
    for name, tensor in list(tensors._asdict().items())[2:]:
        if tensor is not None:
            check_tensor(name, tensor, sums if name in ("moments", "weight_sums") else added, x.device)


def _check_shapes(tensors: _Tensors) -> None:
    x, weight, bias, residual, leading = tensors[:5]
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
    if leading is not None:
        if residual is not None:
            raise ValueError("leading and residual do not go together: give one of them")
        samples = [*x.shape[:-2]]
        if leading.dim() < 2 or [*leading.shape[:-2]] not in ([], samples) or leading.shape[-1] != features:
            accepted = " or ".join(dict.fromkeys((f"{[*samples, 'P', features]}", f"{['P', features]}")))
            raise ValueError(f"leading must be {accepted.replace(chr(39), '')}, got {list(leading.shape)}")


def _check_moments(tensors: _Tensors, normalize: float | None) -> None:
    x, moments, sums, features = tensors.x, tensors.moments, tensors.weight_sums, tensors.weight.shape[0]
    if moments is None and sums is None:
        return
    if moments is None or sums is None:
        raise ValueError("moments and weight_sums go together: give both or none")
    if normalize is None:
        raise ValueError("moments are of use with a layer norm alone: give normalize, too, or leave them out")
    rows = [*x.shape[:-1]]
    if moments.dim() != x.dim() + 1 or [*moments.shape[:-2]] != rows or moments.shape[-1] != 3 or not moments.shape[-2]:
        accepted = f"{[*rows, 'P', 3]}".replace(chr(39), "")
        raise ValueError(f"moments must be {accepted} with P of at least 1, got {list(moments.shape)}")
    if moments.stride(-1) != 1 or (moments.shape[-2] > 1 and moments.stride(-2) != 3):
        raise ValueError(f"moments must have their last two axes in one piece, got strides {moments.stride()}")
    if tuple(sums.shape) != (features,) or not sums.is_contiguous():
        raise ValueError(f"weight_sums must be [{features}], contiguous, got {list(sums.shape)}")


def _check_options(
    normalize: float | None,
    relu: bool,
    out_dtype: torch.dtype | None,
    out_dtypes: Sequence[torch.dtype],
    config: LinearConfig | NativeLinearConfig | None,
) -> None:
    if normalize is not None:
        check_epsilon("normalize", normalize, "the epsilon of a layer norm or None")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be True or False, got {relu!r}")
    if out_dtype is not None and out_dtype not in out_dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in out_dtypes)
        raise TypeError(f"out_dtype must be one of {accepted}, got {out_dtype}")
    if isinstance(config, NativeLinearConfig):
        check_config(config, NativeLinearConfig, native.problem)
    else:
        check_config(config, LinearConfig, configs.problem)
