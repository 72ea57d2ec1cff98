"""The specification of topology-masked attention in plain PyTorch: any device, differentiable any number of times.

Out of scaled dot-product attention (Vaswani et al. 2017, equation 1) with FastMETRO's mask (Cho et al. 2022,
section 3.3) only the allowed pairs are computed: rows are gathered by list length, so that memory grows with the
number of neighbours and not with L x L. Accumulates in float32 (float64 for float64 inputs). Deterministic: sums
are matrix products, gathers are by indexing, whose gradient PyTorch accumulates in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.attention.dropout import dropped
from fastmetro_kernels.attention.ops import lse_dtype
from fastmetro_kernels.topology import TokenTopology

_BLOCK_ROWS = 128
"""Gradients of hubs are summed over so many rows at a time; then the sums are added."""


def reasons(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> list[str]:
    """The reference runs everything that passes the checks of the API."""
    return []


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topology: TokenTopology,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens: (out [B, L, H, D] in q.dtype, lse [B, H, L]); see `topology_attention`."""
    dtype = q.dtype
    q, k, v = (tensor.to(lse_dtype(dtype)) for tensor in (q, k, v))
    hubs = topology.num_hubs
    if topology.num_tokens == 0:
        out, lse = _nothing(q, k, v)
        return out.to(dtype), lse
    outs, lses = [], []
    if hubs:
        out, lse = _hub_rows(q[:, :hubs], k, v, scale, dropout_p, seed)
        outs.append(out)
        lses.append(lse)
    if topology.num_vertices:
        out, lse = _vertex_rows(q, k, v, topology, scale, dropout_p, seed)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1).to(dtype), torch.cat(lses, 2)


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without keys [B, R, H, D]: output 0 and lse -inf, with zero gradients as from every other row."""
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    joined = (q + k + v).masked_fill(everywhere, 0.0)
    return joined, joined.sum(-1).transpose(1, 2).masked_fill(everywhere, -torch.inf)


def _hub_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The dense rows: q [B, K, H, D] against all tokens."""
    tokens = torch.arange(k.shape[1], device=q.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None])
    weights = dropped(weights, seed, dropout_p, tokens[: q.shape[1], None], tokens)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def _vertex_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topology: TokenTopology,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sparse rows, group by group of equal padded list length, put back into vertex order."""
    hubs = topology.num_hubs
    outs, lses = [], []
    row, entry = 0, 0
    for count, width in topology.groups:
        rows = topology.group_rows[row : row + count]
        entries = topology.group_entries[entry : entry + count * width]
        padding = topology.group_padding[entry : entry + count * width].view(count, width)
        row, entry = row + count, entry + count * width
        neighbors = topology.columns[entries].long().view(count, width)
        out, lse = _group(q, k, v, rows + hubs, neighbors + hubs, padding, hubs, scale, dropout_p, seed)
        outs.append(out)
        lses.append(lse)
    places = torch.argsort(topology.group_rows)
    return torch.cat(outs, 1)[:, places], torch.cat(lses, 2)[:, :, places]


def _group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    neighbors: Tensor,
    padding: Tensor,
    hubs: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rows `queries` [R] over the hubs and their `neighbors` [R, W] (token numbers; `padding` [R, W] repeats)."""
    count, width = neighbors.shape
    rows = q[:, queries] * scale
    if hubs + width == 0:
        return _nothing(rows, k[:, queries], v[:, queries])
    to_hubs = _times_hubs(rows.transpose(1, 2), k[:, :hubs].permute(0, 2, 3, 1))
    to_neighbors = torch.einsum("brhd,brwhd->bhrw", rows, k[:, neighbors])
    scores = torch.cat([to_hubs, to_neighbors.masked_fill(padding, -torch.inf)], -1)
    lse = torch.logsumexp(scores, -1)
    hub_keys = torch.arange(hubs, device=q.device).expand(count, hubs)
    weights = torch.exp(scores - lse[..., None])
    weights = dropped(weights, seed, dropout_p, queries[:, None], torch.cat([hub_keys, neighbors], -1))
    out = _times_hubs(weights[..., :hubs], v[:, :hubs].transpose(1, 2)).transpose(1, 2)
    out = out + torch.einsum("bhrw,brwhd->brhd", weights[..., hubs:], v[:, neighbors])
    return out, lse


def _times_hubs(rows: Tensor, hubs: Tensor) -> Tensor:
    """The product rows [B, H, R, E] @ hubs [B, H, E, F], whose gradient in `hubs` is a sum of sums over blocks of rows.

    Every row has a part in the gradient of every hub. As one matrix product they may be added one after the other, and
    on an H200 they were: over 6,890 rows the largest rounding error was nine times that of a sum in blocks.
    """
    count = rows.shape[2]
    blocks = max(1, -(-count // _BLOCK_ROWS))
    size = -(-count // blocks)
    padded = F.pad(rows, (0, 0, 0, blocks * size - count)).unflatten(2, (blocks, size))
    return (padded @ hubs.unsqueeze(2)).flatten(2, 3)[:, :, :count]
