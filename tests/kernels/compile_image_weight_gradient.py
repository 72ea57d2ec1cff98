"""Compile the kernels of the first convolution's weight gradient for an NVIDIA GPU, on any machine.

`python compile_image_weight_gradient.py CAPABILITY DTYPE OUTPUTS` compiles them for ResNet's 7 x 7 window. It prints
one JSON object: for each its registers, bytes of stack (spills) and of shared memory, whether it waits for earlier
kernels, and whether its products are those of tensor cores. Needs TRITON_INTERPRET=0.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_attention import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.image_weight_gradient import triton as kernels
from fastmetro_kernels.image_weight_gradient.plan import CONFIGS, PATCH


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch gives it."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = f"*{dtype}" if name in ("x", "grad", "weight") else "*fp32" if name == "partials" else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and kind.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def main() -> None:
    capability, dtype, outputs = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    early = capability >= 90
    common = {"CHANNELS": 3, "OUTPUTS": outputs, "KERNEL": 7, "PATCH": PATCH, "EARLY": early}
    jobs: list[tuple[str, Any, dict[str, Any], int]] = []
    for positions, warps in dict.fromkeys((one.positions, one.warps) for one in CONFIGS):
        flags = {"STRIDE": 2, "PADDING": 3, "POSITIONS": positions, "WIDE": False}
        jobs.append((f"sums {positions} x {warps}", kernels.image_weight_gradient_kernel, flags, warps))
    flags = {"COLUMNS": kernels.COLUMNS, "PARTS": kernels.PARTS}
    jobs.append(("join", kernels.image_weight_gradient_join_kernel, flags, 4))
    report = {}
    for name, kernel, flags, warps in jobs:
        options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source(kernel, dtype, common | flags), target=target, options=options)
        ptx = compiled.asm["ptx"]
        used = {"waits": "griddepcontrol.wait" in ptx, "products": "wgmma" in ptx or "mma.sync" in ptx}
        report[name] = resources(compiled) | used | {"wgmma": "wgmma" in ptx}
        print(name, report[name], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
