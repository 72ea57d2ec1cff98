"""The public functions: checks, and the choice of a backend."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels.adamw import reference
from fastmetro_kernels.adamw.plan import AdamWConfig, problem
from fastmetro_kernels.adamw.tables import Tables
from fastmetro_kernels.backends import select, triton_interpreted, triton_reasons
from fastmetro_kernels.fused.inference import check_config, check_epsilon, check_tensor

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Accepted dtypes; float64 runs on the reference alone."""
HALVES = (torch.bfloat16, torch.float16)


class AdamWGroup(NamedTuple):
    """Tensors that are updated with the same numbers; lists of equal length, one entry per parameter.

    Attributes:
        parameters: float32 (reference: also float64), of any shape, without holes or overlaps in memory.
        gradients: of the same shapes; float32, bfloat16 or float16 each (float64 for float64 parameters). One whose
            strides differ from the parameter's is copied first.
        exp_avgs, exp_avg_sqs: moments, as the parameters in dtype, shape and strides.
        steps: one float32 number each, counted up by every update.
        halves: bfloat16 or float16 copies of parameters, of the same shapes and strides, written with them; or None.
        rate: the learning rate: float32, one number on the device, or a float.
        betas: of the moments, at least 0 and below 1.
        epsilon: finite, at least 0.
        weight_decay: finite, at least 0.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    halves: Sequence[Tensor | None] | None = None
    rate: Tensor | float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-2


def gradient_norm(
    gradients: Sequence[Tensor],
    *,
    tables: Tables | None = None,
    config: AdamWConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """The L2 norm of all gradients together, as ``torch.nn.utils.get_total_norm``, in two launches.

    Squares are summed in float32 (float64 with float64 gradients) in a fixed order: equal calls give equal bits.

    Args:
        gradients: float32, bfloat16, float16 or (reference) float64, on one device; any shapes and strides.
        tables: what the caller keeps between calls; needed in a CUDA graph.
        config: the tile of the Triton kernels instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        float32 (float64), one number, []; 0 without gradients.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: gradients of several devices; an unknown backend.
        RuntimeError: in a CUDA graph, without tables that have seen gradients of these sizes.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    gradients = list(gradients)
    check_config(config, AdamWConfig, problem)
    if not gradients:
        return torch.zeros(())
    device = gradients[0].device if isinstance(gradients[0], Tensor) else None
    for number, gradient in enumerate(gradients):
        check_tensor(f"gradients[{number}]", gradient, GRADIENTS, device)
    if _choose(backend, gradients) == "reference":
        with torch.no_grad():
            return reference.gradient_norm(gradients)
    from fastmetro_kernels.adamw import triton

    dense = [gradient.detach() if _is_dense(gradient) else gradient.detach().contiguous() for gradient in gradients]
    return triton.gradient_norm(dense, tables or Tables(), config)


def adamw(
    groups: Sequence[AdamWGroup],
    *,
    max_norm: float | None = None,
    tables: Tables | None = None,
    config: AdamWConfig | None = None,
    backend: str = "auto",
) -> Tensor | None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) on all tensors, in place::

        g = min(1, max_norm / (norm of all gradients + 1e-6)) * gradient
        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        p = p - rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon) + weight_decay * p)

    as ``clip_grad_norm_`` and ``torch.optim.AdamW`` do, but that gradients are only read. With ``max_norm`` in three
    launches, without it in two; in float32, in a fixed order: equal calls give equal bits. Nothing waits.

    In a CUDA graph rates that are tensors, gradients and moments are read anew in each replay; all other numbers are
    those of the capture. Make one step before, with the same tables, and keep the tables as long as the graph.

    Args:
        groups: of tensors that are all on one device. No tensor may stand in them twice.
        max_norm: largest norm of all gradients together, at least 0, or infinite: only the norm is taken then.
        tables: what the caller keeps between calls; needed in a CUDA graph.
        config: the tile of the Triton kernels instead of the pinned one, for measurements.
        backend: ``"auto"`` (Triton where it can run on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        The norm before clipping, float32 (float64), []; None without ``max_norm``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, strides, devices or values that do not fit; an unknown backend.
        RuntimeError: in a CUDA graph, without tables that have seen tensors of these sizes.
        BackendUnavailable: the named backend cannot take this input; the message tells why.
    """
    groups = list(groups)
    check_config(config, AdamWConfig, problem)
    if max_norm is not None:
        if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
            raise TypeError(f"max_norm must be a number or None, got {max_norm!r}")
        if not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    _check(groups)
    parameters = [parameter for group in groups for parameter in group.parameters]
    if not parameters:
        return None if max_norm is None else torch.zeros(())
    given = itertools.chain.from_iterable(group.gradients for group in groups)
    with torch.no_grad():
        gradients = [_laid_out(gradient, parameter) for gradient, parameter in zip(given, parameters, strict=True)]
        if _choose(backend, [*parameters, *gradients]) == "reference":
            norm = reference.adamw(groups, gradients, max_norm)
        else:
            from fastmetro_kernels.adamw import triton

            norm = triton.adamw(groups, gradients, max_norm, tables or Tables(), config)
    for group in groups:  # what was computed from older values can tell; PyTorch's fused operation does not see to it
        halves = [half for half in group.halves or () if half is not None]
        changed = (*group.parameters, *group.exp_avgs, *group.exp_avg_sqs, *group.steps, *halves)
        torch.autograd.graph.increment_version(changed)
    return norm


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides, but for axes of size 1, whose stride means nothing."""
    if one.stride() == other.stride():
        return one.shape == other.shape
    strides = zip(one.shape, one.stride(), other.stride(), strict=False)
    return one.shape == other.shape and all(size <= 1 or a == b for size, a, b in strides)


def _is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, without holes or overlaps."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):  # noqa: B905
        if stride != expected:
            return False
        expected *= size
    return True


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    if same_layout(gradient, parameter):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _choose(backend: str, tensors: Sequence[Tensor]) -> str:
    reasons = list(triton_reasons(tensors[0].device))
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        reasons.append("float64 is not supported")
    order = ("reference",) if triton_interpreted() else ("triton", "reference")
    return select("adamw", backend, {"triton": reasons, "reference": []}, order)


def _check(groups: Sequence[AdamWGroup]) -> None:
    device = None
    for place, group in enumerate(groups):
        if not isinstance(group, AdamWGroup):
            raise TypeError(f"groups[{place}] must be an AdamWGroup, got {type(group).__name__}")
        _check_numbers(f"groups[{place}]", group)
        count = len(group.parameters)
        for name in ("gradients", "exp_avgs", "exp_avg_sqs", "steps", "halves"):
            found = getattr(group, name)
            if found is not None and len(found) != count:
                raise ValueError(f"groups[{place}].{name} must be {count} like the parameters, got {len(found)}")
        for number in range(count):
            device = _check_tensors(f"groups[{place}]", group, number, device)
        if isinstance(group.rate, Tensor) and count:
            check_tensor(f"groups[{place}].rate", group.rate, (torch.float32,), device)
            if group.rate.numel() != 1:
                raise ValueError(f"groups[{place}].rate must be one number, got {list(group.rate.shape)}")


def _check_numbers(where: str, group: AdamWGroup) -> None:
    if not isinstance(group.rate, Tensor):
        check_epsilon(f"{where}.rate", group.rate, "a number or a tensor")
    check_epsilon(f"{where}.epsilon", group.epsilon)
    check_epsilon(f"{where}.weight_decay", group.weight_decay)
    if len(group.betas) != 2 or not all(isinstance(beta, float) and 0 <= beta < 1 for beta in group.betas):
        raise ValueError(f"{where}.betas must be two numbers, at least 0 and below 1, got {group.betas}")


def _check_tensors(where: str, group: AdamWGroup, number: int, device: torch.device | None) -> torch.device:
    """The tensors of one parameter; returns the device."""
    parameter = group.parameters[number]
    check_tensor(f"{where}.parameters[{number}]", parameter, (torch.float32, torch.float64), device)
    if not _is_dense(parameter):
        strides = f"shape {list(parameter.shape)}, strides {list(parameter.stride())}"
        raise ValueError(f"{where}.parameters[{number}] must fill its memory, without holes or overlaps, got {strides}")
    double = parameter.dtype == torch.float64
    others: list[tuple[str, Any, tuple[torch.dtype, ...]]] = [
        ("gradients", group.gradients[number], GRADIENTS[3:] if double else GRADIENTS[:3]),
        ("exp_avgs", group.exp_avgs[number], (parameter.dtype,)),
        ("exp_avg_sqs", group.exp_avg_sqs[number], (parameter.dtype,)),
        ("halves", None if group.halves is None else group.halves[number], HALVES),
    ]
    for name, tensor, dtypes in others:
        if tensor is None and name == "halves":
            continue
        check_tensor(f"{where}.{name}[{number}]", tensor, dtypes, parameter.device)
        if tensor.shape != parameter.shape:
            wanted = f"{list(parameter.shape)} like the parameter, got {list(tensor.shape)}"
            raise ValueError(f"{where}.{name}[{number}] must be {wanted}")
        if name != "gradients" and not same_layout(tensor, parameter):
            wanted = f"strides {list(parameter.stride())} like the parameter, got {list(tensor.stride())}"
            raise ValueError(f"{where}.{name}[{number}] must have {wanted}")
    step = group.steps[number]
    check_tensor(f"{where}.steps[{number}]", step, (torch.float32,), parameter.device)
    if step.numel() != 1:
        raise ValueError(f"{where}.steps[{number}] must be one number, got {list(step.shape)}")
    return parameter.device
