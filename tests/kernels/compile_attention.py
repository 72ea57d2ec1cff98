"""Compile the Triton attention kernels for an NVIDIA GPU, on any machine; run by `test_triton_compiles.py`.

`python compile_attention.py CAPABILITY DTYPE HEAD_DIM [dropout] [long_lists] [strided] [ones]` prints one JSON
object: for each kernel its registers, bytes of stack (spills) and bytes of shared memory. Needs TRITON_INTERPRET=0:
with the interpreter chosen, kernels are plain Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.attention.triton import CONFIGS, WINDOW_ROWS, Config
from fastmetro_kernels.attention.triton_backward import (
    attention_backward_columns_kernel,
    attention_backward_rows_kernel,
    combine_gradients_kernel,
)
from fastmetro_kernels.attention.triton_forward import attention_forward_kernel, combine_outputs_kernel

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
TENSORS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}
INDICES = {"row_order", "key_offsets", "keys", "row_masks"}
FACTORS = {"scale", "keep_scale"}
ONES = ("heads", "tokens", "num_hubs", "slots", "splits")
PARTIALS = ("partial_out", "partial_lse", "partials", "partials_k", "partials_v")


def source(kernel: Any, dtype: str, constants: dict[str, Any], strided: bool) -> ASTSource:
    """The kernel with the types and alignments that a launch on contiguous (or strided) tensors gives it."""
    signature, attributes = {}, {}
    constants = dict(constants)
    for position, name in enumerate(kernel.arg_names):
        if name.startswith("stride_") and name.endswith("_dim") and not strided:
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in FACTORS:
            signature[name] = "fp32"
        elif name in TENSORS:
            signature[name] = f"*{dtype}"
        elif name in INDICES:
            signature[name] = "*i32"
        elif name == "seed":
            signature[name] = "*i64"
        elif name in {"lse", "grad_lse", "delta"} or name.startswith("partial"):
            signature[name] = "*fp32"
        else:
            signature[name] = "i64" if strided and name.startswith("stride_") else "i32"
        if signature[name].startswith("*") or (name.startswith("stride_") and not strided):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, bytes of stack per thread, bytes of shared memory per program."""
    dumper = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([dumper, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found, text.stdout
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared}


def main() -> None:
    capability, dtype, dim = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    flags = set(sys.argv[4:])
    block = max(16, triton.next_power_of_2(dim))
    shape = {"DIM": dim, "BLOCK_DIM": block, "ROWS": WINDOW_ROWS}
    combine = Config(0, 4, 1)
    forward, backward = CONFIGS["forward", BYTES[dtype]][block], CONFIGS["backward", BYTES[dtype]][block]
    report = {}
    for kernel, config in (
        (attention_forward_kernel, forward),
        (attention_backward_rows_kernel, backward),
        (attention_backward_columns_kernel, backward),
        *([] if "ones" in flags else [(combine_outputs_kernel, combine), (combine_gradients_kernel, combine)]),
    ):
        constants = {**shape, "KEYS": config.keys, "ONE_TILE": "long_lists" not in flags}
        if "ones" in flags:  # the launcher turns integers that are 1 into constants
            constants |= dict.fromkeys(ONES, 1) | dict.fromkeys(PARTIALS)
        if "dropout" not in flags:
            constants["seed"] = None
        compiled = triton.compile(
            source(kernel, dtype, constants, "strided" in flags),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.warps, "num_stages": config.stages},
        )
        report[kernel.__name__] = resources(compiled)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
