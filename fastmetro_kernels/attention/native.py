"""Attention by the compiled extension (`csrc/attention/`): C++ on CPU tensors; there are no CUDA kernels of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.attention import ops  # noqa: F401  (declares the ops)
from fastmetro_kernels.topology import TokenTopology

MAX_HEAD_DIM = 256
"""The widest head of the native kernels (`kMaxDim` in `csrc/attention/problem.h`)."""

_forward = torch.ops.fastmetro_kernels.attention_forward_native.default
_backward = torch.ops.fastmetro_kernels.attention_backward_native.default


def reasons(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> list[str]:
    """Why the extension cannot take this input; empty when it can."""
    missing = backends.native_reasons("attention_forward_native", q.device)
    if not missing and q.shape[-1] > MAX_HEAD_DIM:
        missing = [f"native kernels take head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]}"]
    return missing


def forward(
    q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse); see `topology_attention`."""
    return _forward(q, k, v, topology.row_offsets, topology.columns, topology.num_hubs, scale, dropout_p, seed)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    topology: TokenTopology,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous."""
    return _backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        topology.row_offsets,
        topology.columns,
        topology.t_row_offsets,
        topology.t_columns,
        topology.num_hubs,
        scale,
        dropout_p,
        seed,
    )
