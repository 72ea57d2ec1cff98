"""Schema and shape rules of the crops; ``triton.py``, imported by the first call, implements them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "fastmetro_kernels"
FINE = 32
"""Positions in a pixel that OpenCV's warpAffine tells apart."""


class CropMap(NamedTuple):
    """Where the pixels of B crops of S x S come from: 2 x 2 bilinear samples each, which are weighed and summed.

    A sample at column c and row r of the crop's 2S x 2S lies at ``matrix [columns[c], rows[r], 1]`` of its picture,
    in numbers of pixels (0 is the middle of the first one), ``origin`` of which lies in front of what was packed.

    Attributes:
        matrix: float64 [B, 6], 2 x 3, row by row.
        columns, rows: float64 [B, 2S].
        column_weights, row_weights: float32 [B, 2S], whose product is a sample's weight.
        origin: float64 [B, 2], whole numbers: column and row.
    """

    matrix: Tensor
    columns: Tensor
    rows: Tensor
    column_weights: Tensor
    row_weights: Tensor
    origin: Tensor


# `fixed`: positions are rounded to 1/32 of a pixel.
torch.library.define(
    f"{NAMESPACE}::render_crops_triton",
    "(Tensor pixels, Tensor offsets, Tensor sizes, Tensor[] places, Tensor factor, Tensor mean, Tensor deviation, "
    "bool fixed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def problem(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, places: CropMap, constants: dict[str, Tensor]
) -> str | None:
    """The first argument whose dtype or shape does not fit, or None; shapes are compared, not read."""
    count, side = offsets.shape[0] if offsets.dim() == 1 else -1, places.columns.shape[-1]
    double, single = torch.float64, torch.float32
    wanted = {
        "pixels": (pixels, torch.uint8, (pixels.shape[0] if pixels.dim() == 1 else -1,)),
        "offsets": (offsets, torch.int64, (count,)),
        "sizes": (sizes, torch.int64, (count, 2)),
        "matrix": (places.matrix, double, (count, 6)),
        "columns": (places.columns, double, (count, side)),
        "rows": (places.rows, double, (count, side)),
        "column_weights": (places.column_weights, single, (count, side)),
        "row_weights": (places.row_weights, single, (count, side)),
        "origin": (places.origin, double, (count, 2)),
        "factor": (constants["factor"], single, (count, 3)),
        "mean": (constants["mean"], single, (3,)),
        "deviation": (constants["deviation"], single, (3,)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            unknown = "N" if name == "pixels" else "B"
            expected = [unknown if size == -1 else size for size in shape]
            return f"{name} must be {dtype} {expected}, got {tensor.dtype} {list(tensor.shape)}"
    if side % 2 or pixels.shape[0] == 0:
        return f"columns must be [B, 2S] and pixels not empty, got {list(places.columns.shape)}, {list(pixels.shape)}"
    return None


@torch.library.register_fake(f"{NAMESPACE}::render_crops_triton")
def _fake(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, places: list[Tensor], factor: Tensor, mean: Tensor,
    deviation: Tensor, fixed: bool,
) -> Tensor:  # fmt: skip
    return check_arguments(pixels, offsets, sizes, places, factor, mean, deviation)


def check_arguments(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, places: list[Tensor], factor: Tensor, mean: Tensor,
    deviation: Tensor,
) -> Tensor:  # fmt: skip
    """A new tensor for the result, where all arguments fit."""
    torch._check(len(places) == len(CropMap._fields), lambda: f"places must be {len(CropMap._fields)} tensors")
    found = problem(pixels, offsets, sizes, CropMap(*places), {"factor": factor, "mean": mean, "deviation": deviation})
    torch._check(found is None, lambda: found or "")
    side = places[1].shape[1] // 2
    return factor.new_empty((factor.shape[0], 3, side, side))


def _render_crops_triton(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, places: list[Tensor], factor: Tensor, mean: Tensor,
    deviation: Tensor, fixed: bool,
) -> Tensor:  # fmt: skip
    from fastmetro_kernels.fused.crops import triton

    out = check_arguments(pixels, offsets, sizes, places, factor, mean, deviation)
    return triton.render(pixels, offsets, sizes, CropMap(*places), (factor, mean, deviation), fixed, out)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::render_crops_triton", _device, _render_crops_triton)

render_crops_triton = torch.ops.fastmetro_kernels.render_crops_triton.default
