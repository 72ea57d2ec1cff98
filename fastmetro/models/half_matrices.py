"""Half-precision copies of a transformer's matrices, which the optimizer writes with the matrices themselves.

As :mod:`~fastmetro.models.backbones.half_weights` does for convolutions, but traced by ``torch.compile``: a layer is
told which tensor to multiply by before the network is called, and autograd leaves the gradient in that tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastmetro.models.attention import MultiheadAttention
from fastmetro.models.backbones.half_weights import HalfCopy, half_copy, keep_copies, usable_copy
from fastmetro.models.matrices import take
from fastmetro.models.transformer import Decoder, Encoder


def keep_half_matrices(module: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> int:
    """Keep half-precision copies of the matrices of a module's encoders and decoders; with None let go of them.

    They come into use inside :func:`half_matrices_in_use`, with
    :class:`~fastmetro.training.optimizer.ClippedAdamW` over the matrices, under autocast to the same dtype and where
    the layers are fused (:func:`~fastmetro.models.transformer.fuse_transformer`). Then a matrix's ``grad`` stays None:
    gradients are cleared by ``optimizer.zero_grad()``.

    The copies are no part of the module, and ``copy.deepcopy`` of it has none.

    Args:
        module: with float32 matrices.
        dtype: bfloat16, float16, or None.

    Returns:
        How many matrices there are.

    Raises:
        TypeError: another dtype, or matrices that are not float32.
    """
    found = list(_matrices(module))
    keep_copies([matrix for _, matrix in found], dtype)
    for owner, matrix in found:
        take(owner, None)
        if (kept := half_copy(matrix)) is not None:
            kept.tensor.requires_grad_(matrix.requires_grad)
    return len(found)


@contextlib.contextmanager
def half_matrices_in_use(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the layers of a module take the copies in this dtype that an optimizer writes, for one forward pass in it.

    Copies of earlier matrices are made anew. A gradient that is in a copy goes to the matrix's own, in float32, so that
    gradients of several passes add up there. CUDA graphs: what a replay reads must be fresh before it.
    """
    taken: list[nn.Module] = []
    for owner, matrix in _matrices(module):
        kept = usable_copy(matrix, dtype)
        if kept is None or not kept.fits(matrix):
            continue
        _prepare(matrix, kept)
        take(owner, kept.tensor)
        taken.append(owner)
    try:
        yield
    finally:
        for owner in taken:
            take(owner, None)


def _prepare(matrix: Tensor, kept: HalfCopy) -> None:
    if kept.is_stale(matrix):
        kept.refresh(matrix)
    kept.tensor.requires_grad_(matrix.requires_grad)
    kept.settle(matrix)


def _matrices(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    for stage in module.modules():
        if not isinstance(stage, (Encoder, Decoder)):
            continue
        for layer in stage.modules():
            if isinstance(layer, nn.Linear):
                yield layer, layer.weight
            elif isinstance(layer, MultiheadAttention):
                yield layer, layer.in_proj_weight
