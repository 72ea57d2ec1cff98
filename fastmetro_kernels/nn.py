"""Modules for people who import layers: topology-masked self-attention and sparse upsampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmetro_kernels.attention import SparseAttentionWeights, topology_attention
from fastmetro_kernels.sparse import SparseMatrix
from fastmetro_kernels.topology import TokenTopology
from fastmetro_kernels.upsampling import sparse_upsample


class TopologyAttention(nn.Module):
    """Multi-head self-attention of mesh tokens, a drop-in for `nn.MultiheadAttention` with a fixed mask.

    Parameter names, shapes and initialisation are those of `nn.MultiheadAttention(embed_dim, num_heads)`, so its
    state dicts load. The topology adds nothing to the state dict. Tensors are batch first.

    Args:
        embed_dim: Width of the tokens; a multiple of `num_heads`.
        num_heads: Number of heads H.
        topology: Which tokens see which, L tokens.
        dropout: Probability of dropping an attention weight in training mode.
        bias: Whether the projections have biases.
        backend: Of `topology_attention`.

    Raises:
        TypeError: `topology` is not a `TokenTopology`.
        ValueError: `embed_dim` is not a positive multiple of `num_heads`, or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        topology: TokenTopology,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a positive multiple of num_heads ({num_heads})")
        if not isinstance(topology, TokenTopology):
            raise TypeError(f"topology must be a TokenTopology, got {type(topology).__name__}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.topology = topology
        self.dropout = dropout
        self.backend = backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, SparseAttentionWeights]:
        """Attends among the tokens.

        Args:
            query: [B, L, embed_dim], tokens hubs first.
            key, value: The same shape; by default the query, and the key (DETR-like decoders add positions to
                query and key only).
            need_weights: Also return the attention weights of every head, in sparse form.
            seed: Of the dropout mask, see `topology_attention`.

        Returns:
            [B, L, embed_dim], or that and the `SparseAttentionWeights`.

        Raises:
            ValueError: the shapes do not fit `embed_dim` or the topology.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 3 or tensor.shape[2] != self.embed_dim:
                raise ValueError(f"{name} must be [B, L, {self.embed_dim}], got {list(tensor.shape)}")
        q, k, v = self._project(query, key, value)
        result = topology_attention(
            q,
            k,
            v,
            self.topology,
            dropout_p=self.dropout if self.training else 0.0,
            seed=seed,
            return_weights=need_weights,
            backend=self.backend,
        )
        out, *weights = result if need_weights else (result,)
        projected = self.out_proj(out.flatten(2))
        return (projected, weights[0]) if need_weights else projected

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v as [B, L, H, D]; inputs that are the same tensor are projected by one product."""
        split = (self.num_heads, self.embed_dim // self.num_heads)
        inputs = [query, key, value]
        projected: list[Tensor] = []
        while len(projected) < 3:
            first = len(projected)
            same = 1
            while first + same < 3 and inputs[first + same] is inputs[first]:
                same += 1
            rows = slice(first * self.embed_dim, (first + same) * self.embed_dim)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            joint = F.linear(inputs[first], self.in_proj_weight[rows], bias)
            projected.extend(part.unflatten(2, split) for part in joint.chunk(same, 2))
        return projected

    def extra_repr(self) -> str:
        """Sizes and backend, shown by `repr`."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"bias={self.in_proj_bias is not None}, backend={self.backend!r}"
        )


class SparseUpsample(nn.Module):
    """Coarse to fine mesh by a fixed sparse matrix: `sparse_upsample` as a layer without parameters.

    Args:
        matrix: [M, N] as a `SparseMatrix`, or anything `SparseMatrix.from_scipy` takes.
        backend: Of `sparse_upsample`.
    """

    def __init__(self, matrix: Any, backend: str = "auto") -> None:
        super().__init__()
        self.matrix = matrix if isinstance(matrix, SparseMatrix) else SparseMatrix.from_scipy(matrix)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, M, C]."""
        return sparse_upsample(x, self.matrix, backend=self.backend)

    def extra_repr(self) -> str:
        """The backend, shown by `repr`."""
        return f"backend={self.backend!r}"
