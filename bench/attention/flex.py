"""FlexAttention with the mask of the mesh, as a baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

RECOMPILES = 256
DEFAULT_BLOCK = 128  # of `create_block_mask`


def block_mask(mask: Tensor, block: int) -> BlockMask:
    """The blocks of `block` x `block` pairs that hold any allowed pair of `mask` [L, L], and the mask within them."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query, key]

    tokens = mask.shape[0]
    return create_block_mask(allowed, None, None, tokens, tokens, device=str(mask.device), BLOCK_SIZE=block)


@functools.cache
def compiled(autotune: bool) -> Callable[..., Any]:
    """FlexAttention by inductor; never the slow uncompiled path, which it would take after too many shapes."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    mode = "max-autotune-no-cudagraphs" if autotune else None
    return torch.compile(flex_attention, dynamic=False, mode=mode)


def forward_options(block: int) -> dict[str, int] | None:
    """Tiles that divide the blocks. None: PyTorch's own choice, tiles of up to 128.

    Only the forward pass takes them: the tiles of the backward pass are fixed by head dim, 128 from 64 on.
    """
    return None if block >= 128 else {"fwd_BLOCK_M": block, "fwd_BLOCK_N": block}


def blocks(dim: int, backward: bool, autotune: bool) -> tuple[int, ...]:
    """Block sizes to try, the best guess first."""
    if backward and dim >= 64 and not autotune:
        return (DEFAULT_BLOCK,)
    return (DEFAULT_BLOCK, 64)


def attention(mask: Tensor, block: int, autotune: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of q, k, v [B, H, L, D]: compiled on a GPU, PyTorch's uncompiled specification on a CPU."""
    pattern = block_mask(mask, block)
    if not mask.is_cuda:
        return functools.partial(flex_attention, block_mask=pattern)
    options = None if autotune else forward_options(block)
    return functools.partial(compiled(autotune), block_mask=pattern, kernel_options=options)
