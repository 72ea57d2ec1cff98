"""Optimised layers for mesh transformers: topology-masked attention, sparse mesh upsampling, rasterisation."""

from fastmetro_kernels.attention import SparseAttentionWeights, topology_attention
from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.fused import decoder_tail, fused_linear, normalize_rows, short_attention
from fastmetro_kernels.rasterization import RasterOutput, interpolate, rasterize
from fastmetro_kernels.sparse import SparseMatrix
from fastmetro_kernels.topology import TokenTopology
from fastmetro_kernels.upsampling import sparse_upsample

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "RasterOutput",
    "SparseAttentionWeights",
    "SparseMatrix",
    "TokenTopology",
    "decoder_tail",
    "fused_linear",
    "interpolate",
    "normalize_rows",
    "rasterize",
    "short_attention",
    "sparse_upsample",
    "topology_attention",
]
