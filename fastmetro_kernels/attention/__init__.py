"""Topology-masked attention: hub tokens see all, vertices see the hubs and their mesh neighbours."""

from fastmetro_kernels.attention.api import topology_attention
from fastmetro_kernels.attention.dispatch import explain
from fastmetro_kernels.attention.weights import SparseAttentionWeights

__all__ = ["SparseAttentionWeights", "explain", "topology_attention"]
