"""What the tests of the residual norm share: its tensors, PyTorch's operations for the same, and all of its results."""

from __future__ import annotations

from typing import Any

import torch
from fused_cases import FLOAT, Runner, randn
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.dropout.random import kept, scale_of_kept
from fastmetro_kernels.residual_norm import residual_norm

Given = dict[str, Tensor]
Shape = tuple[int, ...]
SEED = -6_148_914_691_236_517_205
P = 0.25


def given(
    runner: Runner, shape: Shape, stream: Shape, stream_dtype: torch.dtype | None = None, biased: bool = True
) -> Given:
    """Stream, branch, weight, bias, the branch's bias where it is biased, and the gradients of both results."""
    promoted = torch.promote_types(runner.dtype, stream_dtype or runner.dtype)
    wide = torch.promote_types(promoted, FLOAT)
    return {
        "stream": randn(runner, *stream).to(stream_dtype or runner.dtype) + 0.5,
        "branch": randn(runner, *shape, seed=1),
        "weight": randn(runner, shape[-1], seed=2).to(wide) + 1,
        "bias": randn(runner, shape[-1], seed=3).to(wide),
        **({"branch_bias": randn(runner, shape[-1], seed=6).to(wide)} if biased else {}),
        "more": randn(runner, *shape, seed=4).to(promoted),
        "grad": randn(runner, *shape, seed=5),
    }


def factors(tensors: Given, p: float) -> Tensor:
    """What the branch is multiplied by, float64."""
    branch = tensors["branch"]
    stays = kept(torch.tensor([SEED], device=branch.device), branch.numel() // branch.shape[-1], branch.shape[-1], p)
    return stays.view(branch.shape).double() * scale_of_kept(p)


def plain(tensors: Given, mask: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """PyTorch's operations in the dtypes of the tensors. As a linear layer's, the branch's bias is rounded first."""
    branch = tensors["branch"]
    if "branch_bias" in tensors:
        branch = branch + tensors["branch_bias"].to(branch.dtype)
    new = tensors["stream"] + branch * mask.to(branch.dtype)
    wide = tensors["weight"].dtype
    normed = F.layer_norm(new.to(wide), new.shape[-1:], tensors["weight"], tensors["bias"])
    return new, normed.to(dtype or new.dtype)


def operands(tensors: Given) -> Given:
    """All but the gradients of the results."""
    return {name: tensor for name, tensor in tensors.items() if name not in ("more", "grad")}


def ours(tensors: Given, runner: Runner, p: float = P, dtype: torch.dtype | None = None, **more: Any) -> Any:
    named = operands(tensors)
    return residual_norm(**named, dropout_p=p, seed=SEED, dtype=dtype, backend=runner.backend, **more)


def results(call: Any, tensors: Given, used: str = "both") -> Given:
    """Both results, and the gradients of everything."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in operands(tensors).items()}
    new, normed = call(leaves)
    outs = {"both": (new, normed), "new": (new,), "normed": (normed,)}[used]
    grads = {"both": (tensors["more"], tensors["grad"]), "new": (tensors["more"],), "normed": (tensors["grad"],)}[used]
    torch.autograd.backward(outs, [grad.to(out.dtype) for grad, out in zip(grads, outs, strict=True)])
    found = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"new_stream": new.detach(), "normed": normed.detach()} | found
