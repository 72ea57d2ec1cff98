"""Multi-head attention under `nn.MultiheadAttention`'s parameter names, and the topology mask of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.models.matrices import matrix_of
from fastmetro_kernels import TokenTopology, topology_attention


class MultiheadAttention(nn.Module):
    """The projections of multi-head attention, with the names, shapes and initial values of `nn.MultiheadAttention`.

    What happens between the projections is left to the caller: dense attention for image tokens, masked attention
    for joint and vertex tokens.

    Args:
        width: token width C.
        heads: number of heads H; divides C.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, x: Tensor, start: int, count: int) -> list[Tensor]:
        """`count` consecutive projections of x [B, L, C] (0 = query, 1 = key, 2 = value), each [B, L, H, D]."""
        rows = slice(start * self.width, (start + count) * self.width)
        y = F.linear(x, matrix_of(self, self.in_proj_weight)[rows], self.in_proj_bias[rows])
        return [part.unflatten(-1, (self.heads, -1)) for part in y.chunk(count, dim=-1)]

    def query(self, x: Tensor) -> Tensor:
        """Queries [B, L, H, D] of tokens [B, L, C]."""
        return self._project(x, 0, 1)[0]

    def query_key(self, x: Tensor) -> list[Tensor]:
        """Queries and keys, each [B, L, H, D], of tokens [B, L, C]."""
        return self._project(x, 0, 2)

    def key(self, x: Tensor) -> Tensor:
        """Keys [B, L, H, D] of tokens [B, L, C]."""
        return self._project(x, 1, 1)[0]

    def value(self, x: Tensor) -> Tensor:
        """Values [B, L, H, D] of tokens [B, L, C]."""
        return self._project(x, 2, 1)[0]

    def query_key_value(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, each [B, L, H, D], of tokens [B, L, C]."""
        return self._project(x, 0, 3)

    def merge(self, attended: Tensor) -> Tensor:
        """Join the heads of [B, L, H, D] and apply the output projection: [B, L, C]."""
        return self.out_proj(attended.flatten(-2))

    def merge_without_bias(self, attended: Tensor) -> Tensor:
        """:meth:`merge` but for the bias of the output projection, which is left to what takes the result."""
        return F.linear(attended.flatten(-2), matrix_of(self.out_proj, self.out_proj.weight))

    def forward(self, *_args: Tensor) -> Tensor:
        """Not used: the layers call the projections."""
        raise NotImplementedError("call query, key, value and merge; the attention itself is the caller's choice")


def dense_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention on [B, L, H, D]; `mask` is boolean [L, S] or [H, L, S], True = may attend."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=dropout_p
    )
    return out.transpose(1, 2)


class TokenAttention(nn.Module):
    """Decoder self-attention of joint and vertex tokens under the mesh topology (paper, section 3.2).

    It has no parameters and adds nothing to a state dict; one instance serves all layers of a network.

    Args:
        topology: joints (hubs) and mesh neighbours.
        heads: attention heads H.
        masking: "all", "half-heads" (first half masked) or "none".
        backend: "dense", or a backend name of `fastmetro_kernels.topology_attention`.
    """

    mask: Tensor | None

    def __init__(self, topology: TokenTopology, heads: int, masking: str = "all", backend: str = "auto") -> None:
        super().__init__()
        self.topology = topology
        self.masked_heads = {"all": heads, "half-heads": heads // 2, "none": 0}[masking]
        self.backend = backend
        mask = None
        if backend == "dense" and self.masked_heads:
            mask = topology.mask()
            if self.masked_heads < heads:
                free = torch.ones_like(mask).expand(heads - self.masked_heads, -1, -1)
                mask = torch.cat([mask.expand(self.masked_heads, -1, -1), free])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attend among tokens: q, k, v [B, L, H, D] of any strides -> [B, L, H, D]."""
        if self.backend == "dense" or self.masked_heads == 0:
            return dense_attention(q, k, v, dropout_p, self.mask)
        n = self.masked_heads
        if n == q.shape[2]:
            return topology_attention(q, k, v, self.topology, dropout_p=dropout_p, backend=self.backend)
        q_masked, k_masked, v_masked = q[:, :, :n], k[:, :, :n], v[:, :, :n]
        masked = topology_attention(
            q_masked, k_masked, v_masked, self.topology, dropout_p=dropout_p, backend=self.backend
        )
        return torch.cat([masked, dense_attention(q[:, :, n:], k[:, :, n:], v[:, :, n:], dropout_p)], dim=2)

    def extra_repr(self) -> str:
        """Backend and number of masked heads, for `print(model)`."""
        return f"backend={self.backend!r}, masked_heads={self.masked_heads}"
