"""Compile the fused Triton kernels for an NVIDIA GPU, on any machine; run by `test_fused_compiles.py`.

`python compile_fused.py CAPABILITY DTYPE WIDTH [all]` compiles the tiles that FastMETRO's layers of this width get (or
all tiles) of the linear layer, of the attention over few keys, of the row norm and, at 128, of the decoder tail and of
what makes the network's input of images. It prints one JSON object: for each its registers, bytes of stack (spills),
bytes of shared memory, whether it multiplies on tensor cores, whether it waits for earlier kernels, and whether it
reads before it does. Needs TRITON_INTERPRET=0: with the interpreter chosen, kernels are plain Python.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_attention import BYTES, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.fused.channels_last import triton as order
from fastmetro_kernels.fused.crops import triton as crops
from fastmetro_kernels.fused.decoder_tail import triton as tail
from fastmetro_kernels.fused.decoder_tail.configs import TILES as TAIL_TILES
from fastmetro_kernels.fused.decoder_tail.configs import TailConfig
from fastmetro_kernels.fused.decoder_tail.configs import pinned as pinned_tail
from fastmetro_kernels.fused.decoder_tail.weights import TailWeights
from fastmetro_kernels.fused.linear import triton as linear
from fastmetro_kernels.fused.linear.configs import TILES, LinearConfig, fitted, pinned
from fastmetro_kernels.fused.normalize import triton as norm
from fastmetro_kernels.fused.normalize.configs import NormalizeConfig
from fastmetro_kernels.fused.normalize.configs import pinned as pinned_norm
from fastmetro_kernels.fused.normalize.configs import tiles as all_norm_tiles
from fastmetro_kernels.fused.pixels import triton as pixels
from fastmetro_kernels.fused.pixels.configs import pinned as pinned_pixels
from fastmetro_kernels.fused.short_attention import triton as attention
from fastmetro_kernels.fused.short_attention.configs import TILES as ATTENTION_TILES
from fastmetro_kernels.fused.short_attention.configs import ShortAttentionConfig
from fastmetro_kernels.fused.short_attention.configs import pinned as pinned_attention

TENSORS = {"x", "weight", "bias", "residual", "weight_sums", "moments", "out", "moments_out", "q", "k", "v"}
TENSORS |= {"attended", "shift", "pixels", "mean", *TailWeights._fields}
INPUTS = {"normalize_pixels_kernel": {"pixels": "*u8", "mean": "*fp32", "scale": "*fp32"}}
INPUTS |= {"to_channels_last_kernel": {"x": "*fp32", "pixels": "i32"}}
CROPS = dict.fromkeys(("matrix", "columns", "rows", "origin"), "*fp64") | {"pixels": "*u8"}
CROPS |= dict.fromkeys(("offsets", "sizes"), "*i64") | dict.fromkeys(("factor", "mean", "deviation"), "*fp32")
INPUTS["render_crops_kernel"] = CROPS | dict.fromkeys(("column_weights", "row_weights", "out"), "*fp32")
"""Types of arguments that are not as their names say elsewhere."""


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch on FastMETRO's tensors gives it."""
    signature: dict[str, str] = {}
    attributes = {}
    constants = constants | {name: 1 for name in kernel.arg_names if name.endswith(("_dim", "_feature"))}
    if "stride_weight_feature" in kernel.arg_names:
        del constants["stride_weight_feature"]
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        element = "fp32" if name in {"weight_sums", "moments", "moments_out", "shift"} else dtype
        scalar = "fp32" if name.endswith(("epsilon", "scale")) else "i32"
        usual = f"*{element}" if name in TENSORS else scalar
        signature[name] = INPUTS.get(kernel.__name__, {}).get(name, usual)
        if signature[name].startswith("*") or name == "features" or name.startswith("stride_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def linear_constants(tile: LinearConfig, width: int, normalize: bool, early: bool) -> dict[str, Any]:
    """Of a projection with a bias per token behind a layer norm, or of one with a residual that leaves moments."""
    return {
        "WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "SHARES": tile.shares,
        "NORMALIZE": False, "RELU": not normalize, "TOKEN_BIAS": normalize, "LEADING": 0, "leading": None,
        "PARTS": 16 if normalize else 0,
        "SMALL": tile.rows * tile.columns <= linear._SMALL_TILE, "CONSTANT_WEIGHTS": True, "EARLY": early,
    } | ({"residual": None, "moments_out": None} if normalize else {"moments": None, "weight_sums": None})  # fmt: skip


def attention_constants(tile: ShortAttentionConfig, dim: int, early: bool) -> dict[str, Any]:
    """Of 49 or 50 keys."""
    return {"DIM": dim, "BLOCK_DIM": dim, "ROWS": tile.rows, "KEYS": 64, "EARLY": early}


def report(text: str, compiled: Any) -> dict[str, Any]:
    """What the compiled kernel uses and does."""
    before, wait, _ = text.partition("griddepcontrol.wait")
    return resources(compiled) | {
        "tensor_cores": "mma.sync" in text or "wgmma" in text,
        "waits": bool(wait),
        "reads_early": "ld.global" in before or "prefetch.global.L2" in before,
    }


ROWS = (49, 445)
"""Of small batches, where time counts most; with many rows a tile of 128 x 256 is the fastest although it spills."""


def linear_tiles(element_size: int, width: int, every: bool) -> list[LinearConfig]:
    """All tiles, or those that FastMETRO's layers get."""
    if every:
        return list(dict.fromkeys(fitted(tile, width) for tile in TILES[element_size]))
    features = (512,) if width == 2048 else (width, 3 * width, 4 * width)
    return list(dict.fromkeys(pinned(rows, n, width, element_size) for rows in ROWS for n in features))


def attention_tiles(element_size: int, every: bool) -> list[ShortAttentionConfig]:
    """Likewise."""
    if every:
        return list(ATTENTION_TILES[element_size])
    return list(dict.fromkeys(pinned_attention(8 * batch, 445, element_size) for batch in (1, 32)))


def norm_constants(tile: NormalizeConfig, width: int, shifted: bool, early: bool) -> dict[str, Any]:
    """Of rows of this width, which is a power of two, as they are or with something added to each."""
    marks = 0 if shifted else 64
    found = {"WIDTH": width, "ROWS": tile.rows, "BLOCK": width, "SHIFTED": shifted, "MARKS": marks, "EARLY": early}
    found["MARK_BLOCK"] = max(marks, 1)
    return found if shifted else found | {"shift": None}


def image_jobs(early: bool) -> list[tuple[str, Any, dict[str, Any], int, int]]:
    """What makes the network's input of uint8 pixels and float32 images, for 1 and 256 of them, and of photographs."""
    found: list[tuple[str, Any, dict[str, Any], int, int]] = []
    for tile in dict.fromkeys(pinned_pixels(images * 224 * 224 * 3) for images in (1, 256)):
        constants = {"BLOCK": tile.block, "EARLY": early}
        found.append((f"pixels {tuple(tile)}", pixels.normalize_pixels_kernel, constants, tile.warps, 1))
    for block in order.BLOCKS:
        constants = {"CHANNELS": 3, "BLOCK": block, "EARLY": early}
        found.append((f"order {block}", order.to_channels_last_kernel, constants, block // 256, 1))
    for fixed in (False, True):
        constants = {"FIXED": fixed, "FINE": crops.FINE, "BLOCK": crops.BLOCK}
        found.append((f"crops {'fixed' * fixed}", crops.render_crops_kernel, constants, crops.OPTIONS["num_warps"], 1))
    return found


def norm_tiles(width: int, every: bool) -> list[NormalizeConfig]:
    """All tiles, or those that FastMETRO's layers get."""
    if every:
        return list(all_norm_tiles(width))
    return list(dict.fromkeys(pinned_norm(batch * rows, width) for batch in (1, 32, 256) for rows in ROWS))


def tail_constants(tile: TailConfig, early: bool) -> dict[str, Any]:
    """Of FastMETRO's second stage: 8 heads of 16, 128 features, 512 hidden ones."""
    sizes = {"WIDTH": 128, "BLOCK": 128, "HEADS": 8, "DIM": 16, "FEED_FORWARD": 512, "KEYS": 64, "FULL": True}
    return sizes | {"HIDDEN": tile.hidden, "ROWS": tile.rows, "CONSTANT_WEIGHTS": True, "EARLY": early}


def tail_tiles(element_size: int, every: bool) -> list[TailConfig]:
    """All tiles, or those that FastMETRO's layers get."""
    if every:
        return list(TAIL_TILES[element_size])
    return [pinned_tail(element_size)]


def main() -> None:
    capability, dtype, width, every = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:] == ["all"]
    early, element_size = capability >= 90, BYTES[dtype]
    jobs: list[tuple[str, Any, dict[str, Any], int, int]] = []
    for tile in linear_tiles(element_size, width, every):
        constants = linear_constants(tile, width, width <= 512, early)
        jobs.append((f"linear {tuple(tile)}", linear.fused_linear_kernel, constants, tile.warps, tile.stages))
    if width == 128:
        for tail_tile in tail_tiles(element_size, every):
            constants = tail_constants(tail_tile, early)
            name = f"tail {tuple(tail_tile)}"
            jobs.append((name, tail.decoder_tail_kernel, constants, tail_tile.warps, tail_tile.stages))
    for rows, warps in attention_tiles(element_size, every):
        constants = attention_constants(ShortAttentionConfig(rows, warps), min(width, 512) // 8, early)
        jobs.append((f"attention {(rows, warps)}", attention.short_attention_kernel, constants, warps, 1))
    for norm_tile in norm_tiles(width, every):
        for shifted in (False, True):
            constants = norm_constants(norm_tile, width, shifted, early)
            name = f"norm {tuple(norm_tile)}{', shifted' * shifted}"
            jobs.append((name, norm.normalize_rows_kernel, constants, norm_tile.warps, 1))
    jobs += image_jobs(early) if width == 128 else []
    found = {}
    for name, kernel, constants, warps, stages in jobs:
        options = {"num_warps": warps, "num_stages": stages}
        options |= {"launch_pdl": True} if early and "EARLY" in kernel.arg_names else {}
        options |= crops.OPTIONS if kernel is crops.render_crops_kernel else {}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source(kernel, dtype, constants), target=target, options=options)
        found[name] = report(compiled.asm["ptx"], compiled)
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
