"""Compile the kernels of AdamW for an NVIDIA GPU, on any machine; run by `test_adamw_launches.py`.

`python compile_adamw.py CAPABILITY` compiles them with every tile. It prints one JSON object: for each its registers,
bytes of stack (spills) and of shared memory, whether it waits for earlier kernels, and whether it reads and writes 16
bytes at a time. Needs TRITON_INTERPRET=0: with the interpreter chosen, kernels are plain Python.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_attention import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.adamw import triton as adamw
from fastmetro_kernels.adamw.plan import CONFIGS, SHIFT, AdamWConfig

FLOATS = {"partials", "norm", "factors"}


def source(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch gives it."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = "*fp32" if name in FLOATS else "*i64" if name in ("chunks", "table") else "i32"
        kind = "fp32" if name == "max_norm" else kind
        signature[name] = "constexpr" if name in constants else kind
        if signature[name].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def jobs(tile: AdamWConfig, early: bool) -> list[tuple[str, Any, dict[str, Any], int, bool]]:
    """Names, kernels, what is fixed of them, warps, and whether they are launched early."""
    chunk = {"SHIFT": SHIFT, "CHUNK": tile.chunk, "EARLY": early}
    update = chunk | {"BLOCK": tile.block, "FACTORS": adamw.FACTORS}
    found = [
        ("norm", adamw.adamw_norm_kernel, chunk | {"BLOCK": adamw.norm_block(tile)}, tile.warps, False),
        ("update", adamw.adamw_update_kernel, update, tile.warps, early),
    ]
    sizes = {"PARTS": adamw.PARTS, "TENSORS": adamw.TENSORS, "FACTORS": adamw.FACTORS, "EARLY": early}
    for norm, step in ((True, True), (True, False), (False, True)):
        flags = sizes | {"NORM": norm, "UPDATE": step}
        name = "factors" + " norm" * norm + " update" * step
        found.append((name, adamw.adamw_factors_kernel, flags, adamw.WARPS, early and norm))
    return found


def main() -> None:
    capability = int(sys.argv[1])
    report = {}
    for tile in CONFIGS:
        for name, kernel, constants, warps, early in jobs(tile, capability >= 90):
            label = name if name.startswith("factors") else f"{name} {'x'.join(map(str, tile))}"
            if label in report:
                continue
            options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
            compiled = triton.compile(
                source(kernel, constants), target=GPUTarget("cuda", capability, 32), options=options
            )
            ptx = compiled.asm["ptx"]
            report[label] = resources(compiled) | {
                "waits": "griddepcontrol.wait" in ptx,
                "wide_loads": sum("ld.global" in line and ".v4.b32" in line for line in ptx.splitlines()),
                "wide_stores": sum("st.global" in line and ".v4.b32" in line for line in ptx.splitlines()),
            }
            print(label, report[label], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
