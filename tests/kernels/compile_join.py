"""Compile the kernel of two added 1 x 1 convolutions for an NVIDIA GPU, on any machine; run by its test.

`python compile_join.py CAPABILITY DTYPE CHANNELS SECOND OUTPUTS STRIDE` compiles all tiles that the benchmark times for
such a layer, and prints one JSON object: for each its registers, bytes of stack (spills) and of shared memory, whether
it multiplies on asynchronous tensor cores, how many copies of 16 bytes and smaller ones it has, and whether it waits
for earlier kernels. Needs TRITON_INTERPRET=0: with the interpreter chosen, kernels are plain Python.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_attention import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.convolution.join_configs import JoinConfig, padded, tiles
from fastmetro_kernels.convolution.join_triton import convolution_join_keeping_kernel, convolution_join_kernel

TENSORS = {"x", "weight", "second", "second_weight", "out"}


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch gives it."""
    names = kernel.arg_names
    signature = {name: f"*{dtype}" if name in TENSORS else "i32" for name in names} | {"bias": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    pointers = [names.index(name) for name, kind in signature.items() if kind.startswith("*")]
    indexed = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(position,): [["tt.divisibility", 16]] for position in pointers}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def compiled_tile(tile: JoinConfig, capability: int, dtype: str, sizes: dict[str, int]) -> Any:
    """The kernel with this tile."""
    early = capability >= 90
    constants = sizes | {"RELU": True, "ROWS": tile.rows, "COLUMNS": tile.columns, "EARLY": early}
    if tile.programs:
        kernel = convolution_join_keeping_kernel
        constants |= {"DEPTH": padded(sizes["CHANNELS"]), "SECOND_DEPTH": padded(sizes["SECOND"])}
    else:
        kernel, constants["DEPTH"] = convolution_join_kernel, tile.depth
    options = {"num_warps": tile.warps, "num_stages": tile.stages} | ({"launch_pdl": True} if early else {})
    return triton.compile(source(kernel, dtype, constants), target=GPUTarget("cuda", capability, 32), options=options)


def report(compiled: Any) -> dict[str, Any]:
    """What the compiled kernel uses and does."""
    text = compiled.asm["ptx"]
    return resources(compiled) | {
        "asynchronous": "wgmma.mma_async" in text,
        "copies": text.count("cp.async.cg.shared.global"),
        "small_copies": text.count("cp.async.ca.shared.global"),
        "wide_stores": text.count("st.global.v4"),
        "waits": "griddepcontrol.wait" in text,
    }


def main() -> None:
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    channels, second, outputs, stride = map(int, sys.argv[3:])
    sizes = {"CHANNELS": channels, "SECOND": second, "OUTPUTS": outputs, "STRIDE": stride}
    found = {}
    for tile in tiles(channels, second, outputs):
        found[str(tuple(tile))] = report(compiled_tile(tile, capability, dtype, sizes))
        print(tuple(tile), found[str(tuple(tile))], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
