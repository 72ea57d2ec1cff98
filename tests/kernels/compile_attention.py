"""Compile the Triton attention kernels for an NVIDIA GPU, on any machine; run by `test_triton_compiles.py`.

`python compile_attention.py CAPABILITY DTYPE HEAD_DIM [dropout] [long_lists] [strided] [ones] [tf32x3] [TILE ...]`
prints one JSON object: for each kernel its registers, bytes of stack (spills) and bytes of shared memory. A tile,
KERNEL:ROWSxKEYSxWARPSxSTAGES (kernels: forward, rows, columns), is compiled in place of what is pinned; several may be
given. Needs TRITON_INTERPRET=0: with the interpreter chosen, kernels are plain Python.
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

from fastmetro_kernels.attention.configs import CONFIGS, Config, padded_dim
from fastmetro_kernels.attention.triton_backward import (
    attention_backward_columns_kernel,
    attention_backward_rows_kernel,
    combine_gradients_kernel,
)
from fastmetro_kernels.attention.triton_forward import attention_forward_kernel, combine_outputs_kernel

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
TENSORS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}
INDICES = {"row_order", "key_offsets", "keys"}
FACTORS = {"scale", "keep_scale"}
ONES = ("heads",)
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
        elif name == "row_masks":
            signature[name] = "*i64" if constants["ROWS"] > 32 else "*i32"
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


KERNELS = {
    "forward": attention_forward_kernel,
    "rows": attention_backward_rows_kernel,
    "columns": attention_backward_columns_kernel,
}


def tile_of(text: str) -> tuple[str, Config]:
    """The kernel and the configuration that KERNEL:ROWSxKEYSxWARPSxSTAGES names."""
    kernel, _, numbers = text.partition(":")
    return kernel, Config(*map(int, numbers.split("x")))


def main() -> None:
    capability, dtype, dim = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    flags = {text for text in sys.argv[4:] if ":" not in text}
    named = [tile_of(text) for text in sys.argv[4:] if ":" in text]
    pinned = [(name, CONFIGS[name, BYTES[dtype]][padded_dim(dim)]) for name in KERNELS]
    shape: dict[str, Any] = {"DIM": dim, "BLOCK_DIM": padded_dim(dim)}
    if "dropout" not in flags:
        shape["seed"] = None
    if "ones" in flags:  # the launcher turns integers that are 1 into constants
        shape |= dict.fromkeys(ONES, 1) | dict.fromkeys(PARTIALS)
    jobs: list[tuple[str, Any, dict[str, Any], Config]] = []
    for name, config in named or pinned:
        constants = {"ROWS": config.rows, "KEYS": config.keys, "ONE_TILE": "long_lists" not in flags}
        constants["PRECISION"] = "tf32x3" if "tf32x3" in flags else "ieee"
        label = f"{name}:{'x'.join(map(str, config))}"
        jobs.append((label, KERNELS[name], shape | constants, config))
    if not named and "ones" not in flags:
        for kernel in (combine_outputs_kernel, combine_gradients_kernel):
            jobs.append((kernel.__name__, kernel, shape, Config(16, 0, 4, 1)))
    report = {}
    for label, kernel, constants, config in jobs:
        compiled = triton.compile(
            source(kernel, dtype, constants, "strided" in flags),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.warps, "num_stages": config.stages},
        )
        report[label] = resources(compiled)
        print(label, report[label], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
