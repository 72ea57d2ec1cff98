"""Attention weights in sparse form: what a mesh transformer attends to, without an L x L matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmetro_kernels.attention.dropout import dropped
from fastmetro_kernels.attention.ops import lse_dtype
from fastmetro_kernels.topology import TokenTopology


@dataclass(frozen=True)
class SparseAttentionWeights:
    """Weights of every allowed (query, key) pair, after dropout, as `nn.MultiheadAttention` returns them.

    Attributes:
        hub_rows: [B, H, K, L], weights of the hub queries over all tokens.
        vertex_hubs: [B, H, N, K], weights of the vertex queries over the hubs.
        vertex_neighbors: [B, H, nnz], weights of the vertex queries over their neighbours, in the order of
            `topology.columns` (`topology.rows()` names the query of each).
        topology: The pattern.
    """

    hub_rows: Tensor
    vertex_hubs: Tensor
    vertex_neighbors: Tensor
    topology: TokenTopology

    def to_dense(self) -> Tensor:
        """[B, H, L, L], zero where attention is not allowed; for pictures and small meshes."""
        hubs, tokens = self.topology.num_hubs, self.topology.num_tokens
        batch, heads = self.hub_rows.shape[:2]
        pairs = self.topology.rows() * tokens + self.topology.columns.long() + hubs
        neighbors = self.vertex_neighbors.new_zeros(batch, heads, self.topology.num_vertices * tokens)
        neighbors = neighbors.index_put(
            (
                torch.arange(batch, device=pairs.device)[:, None, None],
                torch.arange(heads, device=pairs.device)[:, None],
                pairs,
            ),
            self.vertex_neighbors,
        )
        vertices = neighbors.view(batch, heads, self.topology.num_vertices, tokens)
        vertices = torch.cat([self.vertex_hubs, vertices[..., hubs:]], -1)
        return torch.cat([self.hub_rows, vertices], 2)


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    topology: TokenTopology,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> SparseAttentionWeights:
    """The weights exp(scale q.k - lse) of every allowed pair, in q.dtype; differentiable in q, k and lse."""
    dtype, hubs = q.dtype, topology.num_hubs
    q, k = (tensor.to(lse_dtype(dtype)) for tensor in (q, k))
    tokens = torch.arange(topology.num_tokens, device=q.device)
    hub_rows = torch.exp(torch.einsum("bqhd,bkhd->bhqk", q[:, :hubs] * scale, k) - lse[:, :, :hubs, None])
    hub_rows = dropped(hub_rows, seed, dropout_p, tokens[:hubs, None], tokens)
    vertex_hubs = torch.einsum("bqhd,bkhd->bhqk", q[:, hubs:] * scale, k[:, :hubs])
    vertex_hubs = torch.exp(vertex_hubs - lse[:, :, hubs:, None])
    vertex_hubs = dropped(vertex_hubs, seed, dropout_p, tokens[hubs:, None], tokens[:hubs])
    queries, keys = topology.rows() + hubs, topology.columns.long() + hubs
    pairs = torch.einsum("behd,behd->bhe", q[:, queries] * scale, k[:, keys])
    pairs = dropped(torch.exp(pairs - lse[:, :, queries]), seed, dropout_p, queries, keys)
    return SparseAttentionWeights(hub_rows.to(dtype), vertex_hubs.to(dtype), pairs.to(dtype), topology)
