"""Compile the max pool's kernels for an NVIDIA GPU, on any machine; run by `test_max_pool.py`.

`python compile_max_pool.py CAPABILITY DTYPE` compiles them for channels that are a multiple of 16, as ResNet-50's stem
has, with tiles of four warps, and once for any channels and offsets of 64 bits ("any"). It prints one JSON object: for
each its registers, bytes of stack (spills) and of shared memory, whether it waits for earlier kernels, and how many
reads and writes it has, by their size. Needs TRITON_INTERPRET=0: with the interpreter chosen, kernels are plain Python.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import triton
from compile_attention import BYTES, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.max_pool import triton as pool
from fastmetro_kernels.max_pool.plan import MaxPoolConfig, plan

JOBS: list[tuple[str, Any, dict[str, Any]]] = [
    ("forward", pool.max_pool_kernel, {}),
    ("backward", pool.max_pool_backward_kernel, {"TWO": False, "more": None}),
    ("backward_two", pool.max_pool_backward_kernel, {"TWO": True}),
]
IMAGES = {"x", "out", "grad", "more", "grad_x"}


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch gives it; where it is wide, of any channels."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = "i64" if name == "strips" and constants["WIDE"] else "i32"
        kind = "*u8" if name == "places" else f"*{dtype}" if name in IMAGES else kind
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (kind.startswith("*") or (name == "channels" and not constants["WIDE"])):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def accesses(ptx: str) -> dict[str, int]:
    """How often each kind of read and write of memory occurs: "ld 16", "st 8"."""
    found: Counter[str] = Counter()
    for kind, _, many, bits in re.findall(r"\b(ld|st)\.global([.\w]*?)(?:\.v(\d))?\.b(\d+)", ptx):
        found[f"{kind} {int(many or 1) * int(bits) // 8}"] += 1
    return dict(found)


def main() -> None:
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    early = capability >= 90
    report = {}
    for rows, wide in ((1, False), (2, False), (4, False), (2, True)):
        config = MaxPoolConfig(rows, 4)
        found = plan(32, 56, 56, 64, BYTES[dtype], config)
        constants: dict[str, Any] = {"ROWS": config.rows, "POSITIONS": found.positions, "CHANNELS": found.channels}
        constants |= {"WIDE": wide, "EARLY": early}
        for name, kernel, flags in JOBS:
            options = {"num_warps": config.warps} | ({"launch_pdl": True} if early else {})
            compiled = triton.compile(
                source(kernel, dtype, constants | flags), target=GPUTarget("cuda", capability, 32), options=options
            )
            ptx = compiled.asm["ptx"]
            label = f"{name} {rows}{' any' * wide}"
            report[label] = resources(compiled) | {"waits": "griddepcontrol.wait" in ptx} | accesses(ptx)
            print(label, report[label], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
