"""Triton backend of topology-masked attention: which inputs it takes, launch configuration, the two ops."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.attention import ops
from fastmetro_kernels.attention.configs import (
    HUB_ROWS,
    Config,
    TritonConfig,
    hub_split,
    padded_dim,
    pinned,
    slots_first,
)
from fastmetro_kernels.attention.triton_backward import (
    attention_backward_columns_kernel,
    attention_backward_rows_kernel,
    combine_gradients_kernel,
)
from fastmetro_kernels.attention.triton_forward import attention_forward_kernel, combine_outputs_kernel
from fastmetro_kernels.topology import TokenTopology

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topology: TokenTopology,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    config: TritonConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, L, H, D]`` in the dtype of ``q`` and log-sum-exp ``[B, H, L]`` float32."""
    (tile,), precision, share = config or pinned("forward", q.element_size(), q.shape[3])
    schedule = topology.schedule_of(tile.rows)
    return torch.ops.fastmetro_kernels.attention_forward_triton(
        q, k, v, schedule.row_order, schedule.key_offsets, schedule.keys, schedule.row_masks, schedule.longest,
        topology.num_hubs, scale, dropout_p, seed, tile, precision, share,
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
    config: TritonConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous ``[B, L, H, D]`` in their dtype. ``grad_lse`` is the gradient of ``lse``."""
    (tile, t_tile), precision, share = config or pinned("backward", q.element_size(), q.shape[3])
    schedule, transposed = topology.schedule_of(tile.rows), topology.t_schedule_of(t_tile.rows)
    return torch.ops.fastmetro_kernels.attention_backward_triton(
        grad_out, grad_lse, q, k, v, out, lse,
        schedule.row_order, schedule.key_offsets, schedule.keys, schedule.row_masks, schedule.longest,
        transposed.row_order, transposed.key_offsets, transposed.keys, transposed.row_masks, transposed.longest,
        topology.num_hubs, scale, dropout_p, seed, tile, t_tile, precision, share,
    )  # fmt: skip


class _Launch(NamedTuple):
    """What the kernels of one call share, whatever their tiles."""

    batch: int
    tokens: int
    heads: int
    dim: int
    num_hubs: int
    hub_tiles: int
    splits: int
    split_tokens: int
    slots_first: bool
    precision: str
    dropout: tuple[int, float]  # threshold in the bits of an int32, scale of the kept weights

    def grid(self, windows: int) -> tuple[int]:
        """Programs of a kernel that works on so many windows."""
        return (self.batch * self.heads * self._slots(windows),)

    def sizes(self, windows: int) -> tuple[int, ...]:
        """heads, tokens, num_hubs, slots, batches, slots_first, splits, split_tokens."""
        slots, order = self._slots(windows), int(self.slots_first)
        return self.heads, self.tokens, self.num_hubs, slots, self.batch, order, self.splits, self.split_tokens

    def _slots(self, windows: int) -> int:
        return self.hub_tiles * self.splits + windows

    def options(self, tile: Config, longest: int) -> dict[str, int | bool | str]:
        """Constants of a kernel with this tile, whose longest list is so long."""
        return {
            "DIM": self.dim,
            "BLOCK_DIM": padded_dim(self.dim),
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "ONE_TILE": self.num_hubs + longest <= tile.keys,
            "PRECISION": self.precision,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def combine_options(self) -> dict[str, int]:
        """The same for the kernels that add up shares."""
        return {"DIM": self.dim, "BLOCK_DIM": padded_dim(self.dim), "num_warps": 4}


def _plan(
    q: Tensor, num_hubs: int, tiles: Sequence[Config], windows: int, dropout_p: float, precision: str, share: int
) -> _Launch:
    """Of one call; `windows` are those of the first kernel."""
    batch, tokens, heads, dim = q.shape
    long_first = slots_first(batch, tokens, heads, dim, q.element_size())
    widest = max(tile.keys for tile in tiles)
    splits, split_tokens = hub_split(batch * heads, tokens, num_hubs, windows, widest, long_first, share)
    threshold = int(dropout_p * 2**32)
    return _Launch(
        batch=batch,
        tokens=tokens,
        heads=heads,
        dim=dim,
        num_hubs=num_hubs,
        hub_tiles=-(-num_hubs // HUB_ROWS),
        splits=splits,
        split_tokens=split_tokens,
        slots_first=long_first,
        precision=precision,
        dropout=(threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)),
    )


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device; make that the device of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _partials(q: Tensor, plan: _Launch, count: int) -> list[Tensor] | None:
    """Float32 memory ``[B H, splits, hubs, D]`` for `count` sums over shares, or None where hubs are not split."""
    if plan.splits == 1 or plan.num_hubs == 0:
        return None
    shape = (count, plan.batch * plan.heads, plan.splits, plan.hub_tiles * HUB_ROWS, plan.dim)
    return list(q.new_empty(shape, dtype=torch.float32).unbind())


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
    tiles: Sequence[int],
    precision: str,
    share: int,
) -> tuple[Tensor, Tensor]:
    out, lse = ops.empty_outputs(q)
    if out.numel() == 0:
        return out, lse
    ops.check_config((tiles,), precision, share)
    tile, windows = Config(*tiles), key_offsets.numel() - 1
    plan = _plan(q, num_hubs, (tile,), windows, dropout_p, precision, share)
    partials = _partials(q, plan, 1)
    partial_out = partial_lse = None
    if partials is not None:
        (partial_out,) = partials
        partial_lse = torch.empty_like(partial_out[..., 0], memory_format=torch.contiguous_format)
    with _on_device(q):
        attention_forward_kernel[plan.grid(windows)](
            q, k, v, out, lse, partial_out, partial_lse,
            row_order, key_offsets, keys, row_masks, seed if dropout_p > 0 else None,
            *q.stride(), *k.stride(), *v.stride(),
            *plan.sizes(windows), scale, *plan.dropout,
            **plan.options(tile, longest),
        )  # fmt: skip
        if partials is not None:
            combine_outputs_kernel[(plan.batch * plan.heads * plan.hub_tiles,)](
                partial_out, partial_lse, out, lse, plan.heads, plan.tokens, num_hubs, plan.splits,
                **plan.combine_options(),
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
    t_row_order: Tensor,
    t_key_offsets: Tensor,
    t_keys: Tensor,
    t_row_masks: Tensor,
    t_longest: int,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    tiles: Sequence[int],
    t_tiles: Sequence[int],
    precision: str,
    share: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = ops.empty_gradients(q)
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    ops.check_config((tiles, t_tiles), precision, share)
    tile, t_tile = Config(*tiles), Config(*t_tiles)
    windows, t_windows = key_offsets.numel() - 1, t_key_offsets.numel() - 1
    plan = _plan(q, num_hubs, (tile, t_tile), windows, dropout_p, precision, share)
    out, lse = out.contiguous(), lse.contiguous()
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    delta = torch.empty_like(lse)
    partials = _partials(q, plan, 3)
    partial_q, partial_k, partial_v = partials or (None, None, None)
    strides = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride())
    used_seed = seed if dropout_p > 0 else None
    with _on_device(q):
        attention_backward_rows_kernel[plan.grid(windows)](
            grad_out, grad_lse, q, k, v, out, lse, grad_q, delta, partial_q,
            row_order, key_offsets, keys, row_masks, used_seed, *strides, *plan.sizes(windows), scale, *plan.dropout,
            **plan.options(tile, longest),
        )  # fmt: skip
        attention_backward_columns_kernel[plan.grid(t_windows)](
            grad_out, q, k, v, lse, delta, grad_k, grad_v, partial_k, partial_v,
            t_row_order, t_key_offsets, t_keys, t_row_masks, used_seed, *strides, *plan.sizes(t_windows), scale,
            *plan.dropout, **plan.options(t_tile, t_longest),
        )  # fmt: skip
        if partials is not None:
            combine_gradients_kernel[(plan.batch * plan.heads * plan.hub_tiles, 3)](
                partial_q, partial_k, partial_v, grad_q, grad_k, grad_v, plan.heads, plan.tokens, num_hubs, plan.splits,
                **plan.combine_options(),
            )  # fmt: skip
    return grad_q, grad_k, grad_v


for _device_type in ("cpu", "cuda"):
    torch.library.impl(f"{ops.NAMESPACE}::attention_forward_triton", _device_type, _launch_forward)
    torch.library.impl(f"{ops.NAMESPACE}::attention_backward_triton", _device_type, _launch_backward)
