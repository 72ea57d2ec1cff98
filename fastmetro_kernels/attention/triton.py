"""Triton backend of topology-masked attention: which inputs it takes, launch configuration, the two ops."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.attention import ops
from fastmetro_kernels.attention.triton_backward import (
    attention_backward_columns_kernel,
    attention_backward_rows_kernel,
    combine_gradients_kernel,
)
from fastmetro_kernels.attention.triton_forward import attention_forward_kernel, combine_outputs_kernel
from fastmetro_kernels.schedule import WINDOW_ROWS
from fastmetro_kernels.topology import TokenTopology

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SPLIT_TOKENS = 256  # hub rows and columns are split into shares of at least this many tokens ...
MAX_SPLITS = 64  # ... and at most this many shares, which one program combines


class Config(NamedTuple):
    """Tile width (tokens streamed at a time), warps and pipeline stages of one kernel."""

    keys: int
    warps: int
    stages: int


# Pinned, because tuning at run time makes first calls slow and CUDA graphs fragile.
# (pass, bytes per element) -> {padded head dim: configuration}
CONFIGS: dict[tuple[str, int], dict[int, Config]] = {
    ("forward", 2): {16: Config(64, 1, 2), 32: Config(64, 2, 2), 64: Config(64, 4, 2), 128: Config(64, 4, 2)},
    ("forward", 4): {16: Config(64, 4, 1), 32: Config(64, 4, 1), 64: Config(32, 4, 1), 128: Config(32, 8, 1)},
    ("backward", 2): {16: Config(64, 2, 2), 32: Config(64, 4, 2), 64: Config(64, 4, 2), 128: Config(64, 4, 2)},
    ("backward", 4): {16: Config(64, 4, 1), 32: Config(32, 4, 1), 64: Config(16, 4, 1), 128: Config(32, 8, 1)},
}


def reasons(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> list[str]:
    """Reasons why this backend cannot run on these (already validated) inputs; empty when it can."""
    found = backends.triton_reasons(q.device)
    if q.dtype not in DTYPES:
        found.append(f"takes float32, float16 and bfloat16, not {q.dtype}")
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        found.append("Triton's interpreter computes bfloat16 wrongly")
    if not 8 <= q.shape[-1] <= 128:
        found.append(f"takes head dims 8 to 128, not {q.shape[-1]}")
    return found


def forward(
    q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[B, L, H, D]`` in the dtype of ``q`` and log-sum-exp ``[B, H, L]`` float32."""
    schedule = topology.schedule
    return torch.ops.fastmetro_kernels.attention_forward_triton(
        q, k, v, schedule.row_order, schedule.key_offsets, schedule.keys, schedule.row_masks, schedule.longest,
        topology.num_hubs, scale, dropout_p, seed,
    )  # fmt: skip


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
    """Gradients of q, k, v, contiguous ``[B, L, H, D]`` in their dtype. ``grad_lse`` is the gradient of ``lse``."""
    schedule, transposed = topology.schedule, topology.t_schedule
    return torch.ops.fastmetro_kernels.attention_backward_triton(
        grad_out, grad_lse, q, k, v, out, lse,
        schedule.row_order, schedule.key_offsets, schedule.keys, schedule.row_masks, schedule.longest,
        transposed.key_offsets, transposed.keys, transposed.row_masks, transposed.longest,
        topology.num_hubs, scale, dropout_p, seed,
    )  # fmt: skip


class _Launch(NamedTuple):
    """What all kernels of one call share."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int, int, int]  # heads, tokens, num_hubs, slots, splits, split_tokens
    dropout: tuple[int, float]  # threshold in the bits of an int32, scale of the kept weights
    splits: int
    hub_tiles: int
    block_dim: int


def _plan(q: Tensor, num_hubs: int, windows: int, dropout_p: float) -> _Launch:
    batch, tokens, heads, dim = q.shape
    hub_tiles = -(-num_hubs // WINDOW_ROWS)
    split_tokens = max(SPLIT_TOKENS, -(-tokens // (MAX_SPLITS * SPLIT_TOKENS)) * SPLIT_TOKENS)
    splits = -(-tokens // split_tokens)
    slots = hub_tiles * splits + windows
    threshold = int(dropout_p * 2**32)
    return _Launch(
        grid=(batch * heads * slots,),
        sizes=(heads, tokens, num_hubs, slots, splits, split_tokens),
        dropout=(threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)),
        splits=splits,
        hub_tiles=hub_tiles,
        block_dim=max(16, triton.next_power_of_2(dim)),
    )


def _options(plan: _Launch, q: Tensor, name: str, num_hubs: int, longest: int) -> dict[str, int | bool]:
    config = CONFIGS[name, q.element_size()][plan.block_dim]
    return {
        "DIM": q.shape[3],
        "BLOCK_DIM": plan.block_dim,
        "ROWS": WINDOW_ROWS,
        "KEYS": config.keys,
        "ONE_TILE": num_hubs + longest <= config.keys,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device; make that the device of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_order: Tensor,
    key_offsets: Tensor,
    keys: Tensor,
    row_masks: Tensor,
    longest: int,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = ops.empty_outputs(q)
    if out.numel() == 0:
        return out, lse
    plan = _plan(q, num_hubs, key_offsets.numel() - 1, dropout_p)
    batch, tokens, heads, dim = q.shape
    partial_out = partial_lse = None
    split_hubs = plan.splits > 1 and num_hubs > 0
    if split_hubs:
        shares = (batch * heads, plan.splits, plan.hub_tiles * WINDOW_ROWS)
        partial_out = q.new_empty((*shares, dim), dtype=torch.float32)
        partial_lse = q.new_empty(shares, dtype=torch.float32)
    with _on_device(q):
        attention_forward_kernel[plan.grid](
            q, k, v, out, lse, partial_out, partial_lse,
            row_order, key_offsets, keys, row_masks, seed if dropout_p > 0 else None,
            *q.stride(), *k.stride(), *v.stride(),
            *plan.sizes, scale, *plan.dropout,
            **_options(plan, q, "forward", num_hubs, longest),
        )  # fmt: skip
        if split_hubs:
            combine_outputs_kernel[(batch * heads * plan.hub_tiles,)](
                partial_out, partial_lse, out, lse, heads, tokens, num_hubs, plan.splits,
                DIM=dim, BLOCK_DIM=plan.block_dim, ROWS=WINDOW_ROWS, num_warps=4,
            )  # fmt: skip
    return out, lse


def _launch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_order: Tensor,
    key_offsets: Tensor,
    keys: Tensor,
    row_masks: Tensor,
    longest: int,
    t_key_offsets: Tensor,
    t_keys: Tensor,
    t_row_masks: Tensor,
    t_longest: int,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = ops.empty_gradients(q)
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    plan = _plan(q, num_hubs, key_offsets.numel() - 1, dropout_p)
    batch, tokens, heads, dim = q.shape
    out, lse = out.contiguous(), lse.contiguous()
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    delta = torch.empty_like(lse)
    partials: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    split_hubs = plan.splits > 1 and num_hubs > 0
    if split_hubs:
        shape = (3, batch * heads, plan.splits, plan.hub_tiles * WINDOW_ROWS, dim)
        sum_q, sum_k, sum_v = q.new_empty(shape, dtype=torch.float32).unbind()
        partials = (sum_q, sum_k, sum_v)
    strides = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride())
    scalars = (*plan.sizes, scale, *plan.dropout)
    used_seed = seed if dropout_p > 0 else None
    with _on_device(q):
        attention_backward_rows_kernel[plan.grid](
            grad_out, grad_lse, q, k, v, out, lse, grad_q, delta, partials[0],
            row_order, key_offsets, keys, row_masks, used_seed, *strides, *scalars,
            **_options(plan, q, "backward", num_hubs, longest),
        )  # fmt: skip
        attention_backward_columns_kernel[plan.grid](
            grad_out, q, k, v, lse, delta, grad_k, grad_v, partials[1], partials[2],
            row_order, t_key_offsets, t_keys, t_row_masks, used_seed, *strides, *scalars,
            **_options(plan, q, "backward", num_hubs, t_longest),
        )  # fmt: skip
        if split_hubs:
            combine_gradients_kernel[(batch * heads * plan.hub_tiles, 3)](
                *partials, grad_q, grad_k, grad_v, heads, tokens, num_hubs, plan.splits,
                DIM=dim, BLOCK_DIM=plan.block_dim, ROWS=WINDOW_ROWS, num_warps=4,
            )  # fmt: skip
    return grad_q, grad_k, grad_v


for _device_type in ("cpu", "cuda"):
    torch.library.impl(f"{ops.NAMESPACE}::attention_forward_triton", _device_type, _launch_forward)
    torch.library.impl(f"{ops.NAMESPACE}::attention_backward_triton", _device_type, _launch_backward)
