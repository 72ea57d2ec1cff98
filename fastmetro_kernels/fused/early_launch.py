"""Programmatic dependent launch for the Triton kernels of this folder: a kernel starts while the one before it ends.

From compute capability 9.0 on a kernel may be launched before the kernel in front of it has finished (CUDA C++
Programming Guide, "Programmatic Dependent Launch and Synchronization"). It then reads its arguments, computes
addresses and loads constants, and waits only before it touches what earlier kernels write. Every kernel waits, also
where it has nothing to do: "the kernel before me has finished" then means that all before that one have, too.
Dependents are let go after the wait, not before: so no more than two kernels run at a time, and what a kernel reads
before its wait may have been written by any launch but the last.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_earlier_kernels(EARLY: tl.constexpr):
    """Waits for everything that earlier kernels of the stream write, then lets the next kernel start."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(base, stride_dim, wanted, WIDTH: tl.constexpr):
    """Where wanted, asks for the rows of WIDTH numbers at the pointers base to come to L2, and waits for nothing."""
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH + LINE - 1) // LINE)
    k = tl.minimum(tl.arange(0, LINES) * LINE, WIDTH - 1).to(tl.int64)
    addresses = (base[:, None] + (k * stride_dim)[None, :]).to(tl.int64)
    if wanted:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
        )


def launches_early(tensor: Tensor) -> bool:
    """Whether kernels on the device of the tensor can start early; they are compiled with EARLY set to this."""
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def launch_options(early: bool) -> dict[str, Any]:
    """Options of the launch beside num_warps and num_stages; the interpreter does not know this one."""
    return {"launch_pdl": True} if early else {}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device; make that the device of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
