"""The reference backend: the product in plain PyTorch, for every device and dtype. This is the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def upsample(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    ell_columns: Tensor | None,
    ell_values: Tensor | None,
    rows: int,
) -> Tensor:
    """``out[b, m, :] = sum of values[e] * x[b, columns[e], :]`` over ``row_offsets[m] <= e < row_offsets[m + 1]``.

    Every batch element and channel is one feature of a token, so that the product is a weighted bag of embeddings:
    summed row by row in the dtype of ``values`` (float32, or float64 for float64 ``x``) and without atomics, so that
    the result is the same in every run. The padded table is not needed.

    Args:
        x: ``[B, N, C]``.
        row_offsets: int32 ``[rows + 1]``.
        columns: int32 ``[nnz]``.
        values: ``[nnz]``.
        ell_columns: Unused.
        ell_values: Unused.
        rows: Number of rows of the matrix.

    Returns:
        ``[B, rows, C]`` in the dtype of ``x``, contiguous.
    """
    batch, tokens, channels = x.shape
    if x.numel() == 0 or rows == 0 or columns.numel() == 0:
        return x.new_zeros((batch, rows, channels))
    features = x.to(values.dtype).permute(1, 0, 2).reshape(tokens, batch * channels)
    sums = torch.nn.functional.embedding_bag(
        columns, features, row_offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    return sums.view(rows, batch, channels).permute(1, 0, 2).to(x.dtype).contiguous()
