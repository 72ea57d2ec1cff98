"""Attention by the compiled extension (`csrc/attention/`): C++ on CPU tensors, CUDA C++ on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastmetro_kernels import backends
from fastmetro_kernels.attention import ops  # noqa: F401  (declares the ops)
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.packing import PackedPlan
from fastmetro_kernels.schedule import WINDOW_ROWS
from fastmetro_kernels.topology import TokenTopology

MAX_HEAD_DIM = 256
"""The widest head of the CPU kernels (`kMaxDim` in `csrc/attention/problem.h`)."""

CUDA_DTYPES = (torch.float16, torch.bfloat16)
CUDA_MAX_HEAD_DIM = 128
_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}
_SMALLEST_SHARED_MEMORY = 99
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table of technical
specifications); of others at least so much."""

_ops = torch.ops.fastmetro_kernels


def reasons(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> list[str]:
    """Why the extension cannot take this input; empty when it can."""
    if q.device.type == "cuda":
        return backends.native_reasons("attention_forward_cuda", q.device) or _cuda_reasons(q, topology)
    missing = backends.native_reasons("attention_forward_native", q.device)
    if not missing and q.shape[-1] > MAX_HEAD_DIM:
        missing = [f"native kernels take head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]}"]
    return missing


def _cuda_reasons(q: Tensor, topology: TokenTopology) -> list[str]:
    found = []
    dim = q.shape[-1]
    if q.dtype not in CUDA_DTYPES:
        found.append(f"the CUDA kernels take float16 and bfloat16, not {q.dtype}")
    if not 8 <= dim <= CUDA_MAX_HEAD_DIM:
        found.append(f"the CUDA kernels take head dims 8 to {CUDA_MAX_HEAD_DIM}, not {dim}")
    if dim > 64 and topology.num_hubs > 16:
        found.append(f"the CUDA kernels take up to 16 hubs for head dims above 64, not {topology.num_hubs}")
    for plan, tensors in ((topology.plan(_ordinary_name("forward", dim)), 2), (topology.plan("backward"), 4)):
        if plan is None:
            found.append("a window of 16 vertices has too many neighbours for the cache of the CUDA kernels")
            break
        needed, available = shared_memory(plan, tensors, dim), _shared_memory(q.device)
        if dim <= CUDA_MAX_HEAD_DIM and needed > available:
            found.append(f"the CUDA kernels need {needed} bytes of shared memory, this device has {available}")
    return found


def shared_memory(plan: PackedPlan, tensors: int, dim: int, narrow: bool = False) -> int:
    """Bytes that a block needs, with dropout: `ForwardShared` of forward.cuh and `BackwardShared` of backward.cuh.

    Args:
        tensors: rows that a slot holds, 2 in the forward and 4 in the backward.
        narrow: whether a group of heads has 64 bytes.
    """
    padded = next((size for size in (16, 32, 64) if dim <= size), 128)
    heads = max((32 if narrow else 64) // padded, 1)
    row = heads * padded * 2
    table = 32 + plan.windows * plan.records.shape[1] + 256 * (-(-(16 * plan.windows + 64) // 64))
    slots = plan.slots * (tensors * row + 16 + 4)
    if tensors == 2:
        hub_sums = 4 * 64 * (padded + 4) if narrow else 0
        return slots + 16 * plan.windows * (row + 16) + 3 * table + hub_sums + 24
    return slots + -(-8 * heads * plan.slots // 16) * 16 + 2 * table


@assumed_constant
def _shared_memory(device: torch.device) -> int:
    capability = torch.cuda.get_device_capability(device)
    return 1024 * _SHARED_MEMORY.get(capability, _SMALLEST_SHARED_MEMORY)


@assumed_constant
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


FEW_MAX_HEAD_DIM = 64
_FEW_SHARED_MEMORY = {"forward": 143616, "backward": 219392}
"""Bytes that a block may need: `kFewBytes` of few.cuh and `kFewBackwardBytes` of few_backward.cuh for heads of 64, the
most of all."""


def takes_few(kernel: str, q: Tensor, topology: TokenTopology) -> bool:
    """Whether the kernel for few rows is taken: up to 2.25 blocks per multiprocessor, so far it was faster than
    the walking kernel on an H200 (bench/results/few_rows_h200.json).

    Args:
        kernel: "forward", or "backward", where the pattern has to be symmetric.
        q: [B, L, H, D] on a CUDA device.
    """
    dim, backward = q.shape[-1], kernel == "backward"
    if topology.few_pairs is None or dim > FEW_MAX_HEAD_DIM or (backward and not topology.symmetric):
        return False
    if _shared_memory(q.device) < _FEW_SHARED_MEMORY[kernel]:
        return False
    heads_of_group = 64 // next(size for size in (16, 32, 64) if dim <= size)
    hub_blocks = (1 + backward) * min(heads_of_group, 2) * -(-topology.num_hubs // WINDOW_ROWS)
    blocks = hub_blocks + len(topology.few_pairs)
    return 4 * q.shape[0] * -(-q.shape[2] // heads_of_group) * blocks <= 9 * _multiprocessors(q.device)


def _ordinary_name(kernel: str, dim: int) -> str:
    return "forward_narrow" if kernel == "forward" and dim <= 32 else kernel


def fills_device(batch: int, heads: int, dim: int, multiprocessors: int) -> bool:
    """Whether blocks of 64 bytes of heads keep most multiprocessors busy, with one block each.

    Then each walks over a whole mesh alone, if that fits. `is_narrow` of cuda_arguments.h is the same rule.
    """
    if dim > 32:
        return False
    blocks = batch * (-(-heads // 2) if dim <= 16 else heads)
    return multiprocessors < 2 * blocks <= 2 * multiprocessors


def _plan(topology: TokenTopology, kernel: str, q: Tensor, segment: int) -> PackedPlan:
    """The plan for `kernel`, "forward" or "backward"."""
    dim = q.shape[-1]
    resident = topology.plan(f"{kernel}_resident")
    if resident is not None and segment == 0 and fills_device(q.shape[0], q.shape[2], dim, _multiprocessors(q.device)):
        tensors = 2 if kernel == "forward" else 4
        if shared_memory(resident, tensors, dim, narrow=True) <= _shared_memory(q.device):
            return resident
    plan = topology.plan(_ordinary_name(kernel, dim))
    assert plan is not None  # reasons() looked
    return plan


def _in_pieces(tensor: Tensor) -> Tensor:
    """The CUDA kernels read eight numbers at a time: other head dims get columns of zeros, which change no product."""
    return functional.pad(tensor, (0, -tensor.shape[-1] % 8)) if tensor.shape[-1] % 8 else tensor


def _as_before(result: Tensor, q: Tensor) -> Tensor:
    """Without the columns of zeros."""
    return result if result.shape == q.shape else result[..., : q.shape[-1]].contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topology: TokenTopology,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse); see `topology_attention`. `segment`: steps that one CUDA block takes, 0: as many as the size asks."""
    if q.device.type == "cuda":
        padded = map(_in_pieces, (q, k, v))
        if segment == 0 and takes_few("forward", q, topology):
            out, lse = _ops.attention_forward_few_cuda(
                *padded, topology.few_pairs, topology.num_hubs, scale, dropout_p, seed
            )
            return _as_before(out, q), lse
        plan = _plan(topology, "forward", q, segment)
        out, lse = _ops.attention_forward_cuda(*padded, *plan, topology.num_hubs, scale, dropout_p, seed, segment)
        return _as_before(out, q), lse
    return _ops.attention_forward_native(
        q, k, v, topology.row_offsets, topology.columns, topology.num_hubs, scale, dropout_p, seed
    )


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
    segment: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous; `segment` as in `forward`."""
    if q.device.type == "cuda":
        padded_grad, *padded = map(_in_pieces, (grad_out, q, k, v, out))
        if segment == 0 and takes_few("backward", q, topology):
            grads = _ops.attention_backward_few_cuda(
                padded_grad, grad_lse, *padded, lse, topology.few_pairs, topology.num_hubs, scale, dropout_p, seed
            )
        else:
            plan = _plan(topology, "backward", q, segment)
            grads = _ops.attention_backward_cuda(
                padded_grad, grad_lse, *padded, lse, *plan, topology.num_hubs, scale, dropout_p, seed, segment
            )
        grad_q, grad_k, grad_v = (_as_before(grad, q) for grad in grads)
        return grad_q, grad_k, grad_v
    return _ops.attention_backward_native(
        grad_out, grad_lse, q, k, v, out, lse, topology.row_offsets, topology.columns, topology.t_row_offsets,
        topology.t_columns, topology.num_hubs, scale, dropout_p, seed,
    )  # fmt: skip
