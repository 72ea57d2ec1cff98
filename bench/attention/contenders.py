"""Who is measured: this project's backends, `scaled_dot_product_attention` and FlexAttention, each in its variants."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention import flex
from bench.attention.cases import HEADS_FIRST, PLAIN, Case, Layout, Tensors, Unavailable
from fastmetro_kernels import topology_attention
from fastmetro_kernels.attention.dispatch import backend_reasons

OURS = ("auto", "native", "triton", "reference")
MASKED_SDPA = ("sdpa_bool", "sdpa_additive", "sdpa_cudnn")
DENSE = "sdpa_dense"
FLEX = ("flex_natural", "flex_rcm")
FLEX_DEFAULT = f"block {flex.DEFAULT_BLOCK}"  # their variant with what PyTorch does if it is not told otherwise
NAMES = (*OURS, *MASKED_SDPA, DENSE, *FLEX)
DEFAULT_CUDA = tuple(name for name in NAMES if name != "sdpa_cudnn")
DEFAULT_CPU = ("auto", "sdpa_bool")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute attention: `attend` takes and gives tensors in `layout`.

    Attributes:
        masked: Whether it heeds the mask of the mesh.
        costly: Takes many seconds to compile and is tried only where time is left.
        kept: Timed also where another variant is faster, because ratios to it are wanted, too.
    """

    name: str
    layout: Layout
    attend: Attend
    masked: bool = True
    costly: bool = False
    kept: bool = False

    def run(self, tensors: Tensors) -> Tensors:
        """(out), or (out, dq, dk, dv) where q requires a gradient, in the layout."""
        q, k, v, grad = tensors
        if not q.requires_grad:
            return (self.attend(q, k, v),)
        out = self.attend(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def variants(name: str, case: Case, backward: bool, autotune: bool = False) -> Iterator[Variant]:
    """The variants of a contender, made when asked for; the best guess comes first.

    Raises:
        Unavailable: the contender cannot take this case.
    """
    if name in OURS:
        yield _ours(name, case)
    elif name in FLEX:
        yield from _flex(name, case, backward, autotune)
    else:
        yield from _sdpa(name, case)


def _ours(name: str, case: Case) -> Variant:
    q, k, v, _ = case.base[0]
    if name != "auto" and (reasons := backend_reasons(q, k, v, case.topology)[name]):
        raise Unavailable("; ".join(reasons))
    return Variant("", PLAIN, functools.partial(topology_attention, topology=case.topology, backend=name))


def additive_mask(case: Case) -> Tensor:
    """[L, L] in the dtype, 0 or -inf. Rows are 16 bytes aligned, so that SDPA need not copy the mask in every call."""
    tokens = case.topology.num_tokens
    unit = 16 // case.dtype.itemsize
    storage = torch.zeros(tokens, -(-tokens // unit) * unit, dtype=case.dtype, device=case.device)
    return storage[:, :tokens].masked_fill_(~case.mask, -torch.inf)


def _sdpa(name: str, case: Case) -> Iterator[Variant]:
    """Contiguous [B, H, L, D] first, then [B, L, H, D] seen through a transpose."""
    mask = case.mask  # asked for without a mask too: the check against float64 needs as many scores
    if name in ("sdpa_additive", "sdpa_cudnn"):
        mask = additive_mask(case)
    attend: Attend = functools.partial(F.scaled_dot_product_attention, attn_mask=None if name == DENSE else mask)
    if name == "sdpa_cudnn":
        if case.device.type != "cuda":
            raise Unavailable("cuDNN attention needs a CUDA device")
        attend = functools.partial(_on_cudnn, attend)
    masked = name != DENSE
    yield Variant("BHLD", HEADS_FIRST, attend, masked)
    if case.device.type == "cuda":
        yield Variant("BLHD", PLAIN, functools.partial(_transposed, attend), masked)


def _on_cudnn(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend(q, k, v)


def _transposed(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flex(name: str, case: Case, backward: bool, autotune: bool) -> Iterator[Variant]:
    if case.device.type == "cpu" and backward:
        raise Unavailable("FlexAttention has no backward pass on a CPU")
    layout, mask = HEADS_FIRST, case.mask
    if name == "flex_rcm":
        layout, order = case.rcm_layout, case.rcm_layout.order
        mask = mask[order][:, order]
    choices = [(block, False) for block in flex.blocks(case.shape.dim, backward, autotune=False)]
    if autotune and case.device.type == "cuda":
        choices += [(block, True) for block in flex.blocks(case.shape.dim, backward, autotune=True)]
    for number, (block, tuned) in enumerate(choices):
        how = ", autotuned" if tuned else "" if case.device.type == "cuda" else ", not compiled"
        title = f"block {block}{how}"
        attend = flex.attention(mask, block, tuned)
        yield Variant(title, layout, attend, costly=number > 0, kept=title == FLEX_DEFAULT)
