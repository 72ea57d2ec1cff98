"""Schemas and shape rules of the attention ops. Kernels are registered elsewhere; nothing here runs one.

`csrc/attention/` implements the native ops for CPU, `triton.py` the Triton ones. Schemas live here, so
that tracing (`torch.compile`, `torch.export`) works whether or not a kernel is present.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmetro_kernels.attention.configs import PASSES, Config, TritonConfig, problem
from fastmetro_kernels.few import BLOCK_BYTES, BLOCK_WINDOWS
from fastmetro_kernels.schedule import WINDOW_ROWS

NAMESPACE = "fastmetro_kernels"


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Log-sum-exp is float32, except that float64 inputs give float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def define(name: str, schema: str) -> None:
    """Declares `fastmetro_kernels::name`; kernels may be registered before or after."""
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def _check_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """The tensor must have exactly this shape (sizes may be symbolic), dtype and device."""
    same_axes = tensor.dim() == len(shape)
    torch._check(same_axes, lambda: f"{name} must have {len(shape)} axes, got shape {tuple(tensor.shape)}")
    for axis, size in enumerate(shape):
        torch._check(
            tensor.size(axis) == size, lambda: f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    torch._check(tensor.dtype == dtype, lambda: f"{name} must be {dtype}, got {tensor.dtype}")
    torch._check(tensor.device == device, lambda: f"{name} must be on {device}, got {tensor.device}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """k and v must match q [B, L, H, D]."""
    torch._check(q.dim() == 4, lambda: f"q must be [B, L, H, D], got {tuple(q.shape)}")
    _check_tensor("k", k, q.shape, q.dtype, q.device)
    _check_tensor("v", v, q.shape, q.dtype, q.device)


def check_lists(q: Tensor, row_offsets: Tensor, columns: Tensor, num_hubs: int) -> None:
    """The neighbour lists must be int32 and describe the L - num_hubs vertices of q."""
    torch._check(0 <= num_hubs <= 64, lambda: f"num_hubs must be 0 to 64, got {num_hubs}")
    _check_tensor("row_offsets", row_offsets, (q.size(1) - num_hubs + 1,), torch.int32, q.device)
    _check_tensor("columns", columns, (columns.size(0),), torch.int32, q.device)


def check_dropout(q: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    """A seed tensor is needed when weights are dropped."""
    torch._check(0.0 <= dropout_p < 1.0, lambda: f"dropout_p must be in [0, 1), got {dropout_p}")
    torch._check(dropout_p == 0.0 or seed is not None, lambda: "dropout_p > 0 needs a seed")
    if seed is not None:
        _check_tensor("seed", seed, (1,), torch.int64, q.device)


def check_saved(q: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """What the backward ops receive besides the inputs: the outputs of the forward and their gradients."""
    _check_tensor("grad_out", grad_out, q.shape, q.dtype, q.device)
    _check_tensor("out", out, q.shape, q.dtype, q.device)
    rows = (q.size(0), q.size(2), q.size(1))
    _check_tensor("lse", lse, rows, lse_dtype(q.dtype), q.device)
    if grad_lse is not None:
        _check_tensor("grad_lse", grad_lse, rows, lse_dtype(q.dtype), q.device)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """The contiguous outputs (out [B, L, H, D] in q.dtype, lse [B, H, L]) of every forward op."""
    batch, tokens, heads, dim = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=lse_dtype(q.dtype))
    return q.new_empty((batch, tokens, heads, dim)), lse


def empty_gradients(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The contiguous gradients (dq, dk, dv), each [B, L, H, D] in q.dtype, of every backward op."""
    shape = tuple(q.shape)
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(shape)


# ---- native (csrc/attention/) ---------------------------------------------------------------------------------

define(
    "attention_forward_native",
    "(Tensor q, Tensor k, Tensor v, Tensor row_offsets, Tensor columns, int num_hubs, float scale, "
    "float dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)",
)
define(
    "attention_backward_native",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor row_offsets, Tensor columns, Tensor t_row_offsets, Tensor t_columns, int num_hubs, float scale, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::attention_forward_native")
def _forward_native_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    check_lists(q, row_offsets, columns, num_hubs)
    check_dropout(q, dropout_p, seed)
    return empty_outputs(q)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward_native")
def _backward_native_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    t_row_offsets: Tensor,
    t_columns: Tensor,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_qkv(q, k, v)
    check_lists(q, row_offsets, columns, num_hubs)
    check_lists(q, t_row_offsets, t_columns, num_hubs)
    check_dropout(q, dropout_p, seed)
    check_saved(q, grad_out, grad_lse, out, lse)
    return empty_gradients(q)


# ---- native on CUDA (csrc/attention/*.cu) ----------------------------------------------------------------------

_PLAN = (
    "Tensor steps, Tensor loads, Tensor restarts, Tensor records, Tensor hub_chunks, Tensor extra_chunks, int slots, "
    "int windows, int num_hubs, float scale, float dropout_p, Tensor? seed, int steps_per_segment"
)
define("attention_forward_cuda", f"(Tensor q, Tensor k, Tensor v, {_PLAN}) -> (Tensor out, Tensor lse)")
define(
    "attention_forward_few_cuda",
    "(Tensor q, Tensor k, Tensor v, Tensor pairs, int num_hubs, float scale, float dropout_p, Tensor? seed) -> "
    "(Tensor out, Tensor lse)",
)
define(
    "attention_backward_few_cuda",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor pairs, "
    "int num_hubs, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
)
define(
    "attention_backward_cuda",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PLAN}) -> (Tensor, Tensor, Tensor)",
)


def check_plan(q: Tensor, records: Tensor, num_hubs: int) -> None:
    """The records of a `PackedPlan` must be those of the L - num_hubs vertices of q."""
    torch._check(0 <= num_hubs <= 64, lambda: f"num_hubs must be 0 to 64, got {num_hubs}")
    windows = -(-(q.size(1) - num_hubs) // WINDOW_ROWS)
    _check_tensor("records", records, (windows, records.size(1)), torch.uint8, q.device)


def check_pairs(q: Tensor, pairs: Tensor, num_hubs: int) -> None:
    """The pairs of windows of `few.py` must be those of the L - num_hubs vertices of q."""
    torch._check(0 <= num_hubs <= 64, lambda: f"num_hubs must be 0 to 64, got {num_hubs}")
    count = -(-(q.size(1) - num_hubs) // (BLOCK_WINDOWS * WINDOW_ROWS))
    _check_tensor("pairs", pairs, (count, BLOCK_BYTES), torch.uint8, q.device)


@torch.library.register_fake(f"{NAMESPACE}::attention_forward_cuda")
def _forward_cuda_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    loads: Tensor,
    restarts: Tensor,
    records: Tensor,
    hub_chunks: Tensor,
    extra_chunks: Tensor,
    slots: int,
    windows: int,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    steps_per_segment: int,
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    check_plan(q, records, num_hubs)
    check_dropout(q, dropout_p, seed)
    return empty_outputs(q)


@torch.library.register_fake(f"{NAMESPACE}::attention_forward_few_cuda")
def _forward_few_cuda_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    check_pairs(q, pairs, num_hubs)
    check_dropout(q, dropout_p, seed)
    return empty_outputs(q)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward_cuda")
def _backward_cuda_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    steps: Tensor,
    loads: Tensor,
    restarts: Tensor,
    records: Tensor,
    hub_chunks: Tensor,
    extra_chunks: Tensor,
    slots: int,
    windows: int,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    steps_per_segment: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_qkv(q, k, v)
    check_plan(q, records, num_hubs)
    check_dropout(q, dropout_p, seed)
    check_saved(q, grad_out, grad_lse, out, lse)
    return empty_gradients(q)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward_few_cuda")
def _backward_few_cuda_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pairs: Tensor,
    num_hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_qkv(q, k, v)
    check_pairs(q, pairs, num_hubs)
    check_dropout(q, dropout_p, seed)
    check_saved(q, grad_out, grad_lse, out, lse)
    return empty_gradients(q)


# ---- Triton (triton.py) ---------------------------------------------------------------------------------------

# `tiles` is a `Config` of configs.py: rows of a window, keys, warps, stages.
define(
    "attention_forward_triton",
    "(Tensor q, Tensor k, Tensor v, Tensor row_order, Tensor key_offsets, Tensor keys, Tensor row_masks, "
    "int longest, int num_hubs, float scale, float dropout_p, Tensor? seed, int[] tiles, str precision, int share) "
    "-> (Tensor out, Tensor lse)",
)
define(
    "attention_backward_triton",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor row_order, Tensor key_offsets, Tensor keys, Tensor row_masks, int longest, "
    "Tensor t_row_order, Tensor t_key_offsets, Tensor t_keys, Tensor t_row_masks, int t_longest, "
    "int num_hubs, float scale, float dropout_p, Tensor? seed, int[] tiles, int[] t_tiles, str precision, int share) "
    "-> (Tensor, Tensor, Tensor)",
)


def check_schedule(
    q: Tensor, row_order: Tensor, lists: tuple[Tensor, Tensor, Tensor], num_hubs: int, rows: int
) -> None:
    """The tensors of a `Schedule` with windows of `rows` (key_offsets, keys, row_masks in `lists`), beside q."""
    torch._check(0 <= num_hubs <= 64, lambda: f"num_hubs must be 0 to 64, got {num_hubs}")
    windows = -(-(q.size(1) - num_hubs) // rows)
    key_offsets, keys, row_masks = lists
    _check_tensor("row_order", row_order, (rows * windows,), torch.int32, q.device)
    _check_tensor("key_offsets", key_offsets, (windows + 1,), torch.int32, q.device)
    _check_tensor("keys", keys, (keys.size(0),), torch.int32, q.device)
    _check_tensor("row_masks", row_masks, (keys.size(0),), torch.int64 if rows > 32 else torch.int32, q.device)


def check_config(tiles: Sequence[Sequence[int]], precision: str, share: int) -> None:
    """The configuration of a pass, of which each kernel has `tiles`."""
    torch._check(all(len(tile) == 4 for tile in tiles), lambda: f"tiles must have 4 numbers each, got {tiles}")
    config = TritonConfig(tuple(Config(*tile) for tile in tiles), precision, share)
    found = problem(config, PASSES[len(tiles) - 1])
    torch._check(found is None, lambda: str(found))


@torch.library.register_fake(f"{NAMESPACE}::attention_forward_triton")
def _forward_triton_fake(
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
    check_qkv(q, k, v)
    check_config((tiles,), precision, share)
    check_schedule(q, row_order, (key_offsets, keys, row_masks), num_hubs, tiles[0])
    check_dropout(q, dropout_p, seed)
    return empty_outputs(q)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward_triton")
def _backward_triton_fake(
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
    check_qkv(q, k, v)
    check_config((tiles, t_tiles), precision, share)
    check_schedule(q, row_order, (key_offsets, keys, row_masks), num_hubs, tiles[0])
    check_schedule(q, t_row_order, (t_key_offsets, t_keys, t_row_masks), num_hubs, t_tiles[0])
    check_dropout(q, dropout_p, seed)
    check_saved(q, grad_out, grad_lse, out, lse)
    return empty_gradients(q)
