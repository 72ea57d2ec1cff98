"""No time without a right result: every contender is held against float64 first.

The budget comes from masked `scaled_dot_product_attention` on the same inputs: a contender may be twice as far off,
tensor by tensor. SDPA itself must be within `SANE`, which shows that mask and float64 reference mean the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from bench.attention.cases import HEADS_FIRST, Case, Tensors, Unavailable
from bench.attention.contenders import Variant
from fastmetro_kernels import topology_attention

SANE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest error of any tensor relative to its norm, by dtype: about ten times what SDPA shows."""

ALL_ELEMENTS = 1 << 23  # up to this size of a tensor every batch element is checked, beyond the first and the last
TENSORS = ("output", "gradient of q", "gradient of k", "gradient of v")


@dataclass(frozen=True)
class Errors:
    """Of one tensor: norm of the difference over the norm of the exact tensor, and largest absolute difference."""

    relative: float
    largest: float


@dataclass(frozen=True)
class Oracle:
    """Float64 results of some batch elements, and the errors that are allowed."""

    elements: list[int]
    exact: Tensors
    limits: list[Errors]


def checked_elements(case: Case) -> list[int]:
    """Batch elements that are held against float64: all, or the first and the last where the tensors are large."""
    batch = case.shape.batch
    if case.tensor_bytes // case.dtype.itemsize <= ALL_ELEMENTS:
        return list(range(batch))
    return sorted({0, batch - 1})


def exact_results(case: Case, elements: list[int], backward: bool, masked: bool) -> Tensors:
    """Output (and gradients of q, k, v) in float64, [len(elements), L, H, D] each; one element at a time."""
    parts = []
    for element in elements:
        q, k, v, grad = (tensor[element : element + 1].double() for tensor in case.base[0])
        for tensor in (q, k, v):
            tensor.requires_grad_(backward)
        if masked:
            out = topology_attention(q, k, v, case.topology, backend="reference")
        else:
            heads = zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True)
            out = torch.stack([F.scaled_dot_product_attention(*head) for head in heads], 2)
        grads = torch.autograd.grad(out, (q, k, v), grad) if backward else ()
        parts.append((out.detach(), *grads))
    return tuple(torch.cat(same) for same in zip(*parts, strict=True))


def errors(results: Tensors, exact: Tensors) -> list[Errors]:
    """Tensor by tensor."""
    found = []
    for result, expected in zip(results, exact, strict=True):
        difference = result.double() - expected
        relative = (difference.norm() / expected.norm()).item()
        found.append(Errors(relative, difference.abs().max().item()))
    return found


def oracle(case: Case, backward: bool, masked: bool) -> Oracle:
    """Exact results and what may differ: twice SDPA's errors, or `SANE` where there is no dense mask.

    Raises:
        ArithmeticError: masked SDPA disagrees with the float64 reference.
    """
    elements = checked_elements(case)
    exact = exact_results(case, elements, backward, masked)
    sane = [Errors(SANE[case.dtype], math.inf)] * len(exact)
    if not masked:
        return Oracle(elements, exact, sane)
    try:
        mask = case.mask
    except Unavailable:
        return Oracle(elements, exact, sane)
    sets = [tensor[elements] for tensor in case.base[0]]
    q, k, v, grad = (HEADS_FIRST.arrange(tensor) for tensor in sets)
    inputs = tuple(tensor.requires_grad_(backward) for tensor in (q, k, v))
    sdpa = Variant("", HEADS_FIRST, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    of_sdpa = errors(tuple(map(HEADS_FIRST.restore, sdpa.run((*inputs, grad)))), exact)
    if problem := _beyond(of_sdpa, sane):
        raise ArithmeticError(f"masked SDPA disagrees with the float64 reference: {problem}")
    unit = torch.finfo(case.dtype).eps
    limits = [
        Errors(2 * one.relative + unit / 8, 2 * one.largest + unit * tensor.abs().max().item())
        for one, tensor in zip(of_sdpa, exact, strict=True)
    ]
    return Oracle(elements, exact, limits)


def _beyond(found: list[Errors], limits: list[Errors]) -> str | None:
    for name, error, limit in zip(TENSORS, found, limits, strict=False):
        # written so that NaN does not pass
        if not (error.relative <= limit.relative and error.largest <= limit.largest):
            return (
                f"{name} off by {error.relative:.1e} of its norm (allowed {limit.relative:.1e}), "
                f"at most {error.largest:.1e} (allowed {limit.largest:.1e})"
            )
    return None


def check(variant: Variant, case: Case, backward: bool, truth: Oracle) -> tuple[list[Errors], str | None]:
    """Runs the variant once on the first set; its errors, and what is wrong with it (None: nothing)."""
    _poison(case)
    return judge(variant.run(case.inputs(variant.layout, backward)[0]), variant, case, truth)


def check_graph(graph: common.Graph, variant: Variant, case: Case, truth: Oracle) -> str | None:
    """What is wrong with the results of a replay; a graph that misses work would be fast."""
    for result in graph.last:
        result.fill_(torch.nan)
    graph.graph.replay()
    return judge(graph.last, variant, case, truth)[1]


def judge(results: Tensors, variant: Variant, case: Case, truth: Oracle) -> tuple[list[Errors], str | None]:
    """Errors of results on the first set, and what is wrong with them (None: nothing)."""
    shape = case.base[0][0].shape
    if any(variant.layout.restore(result).shape != shape for result in results):
        return [], f"gives shapes {[list(result.shape) for result in results]}"
    picked = tuple(variant.layout.restore(_pick(result, truth.elements)) for result in results)
    found = errors(picked, truth.exact)
    problem = _beyond(found, truth.limits)
    if problem is None and not all(torch.isfinite(result).all() for result in results):
        problem = "not finite in an unchecked batch element"
    return found, problem


def _pick(result: Tensor, elements: list[int]) -> Tensor:
    return result if len(elements) == len(result) else result[elements]


def _poison(case: Case) -> None:
    """Fills free memory with NaN: a kernel that leaves rows unwritten must not find there what another one wrote."""
    q = case.base[0][0]
    blocks = [torch.full_like(q, torch.nan) for _ in range(6)]
    del blocks
