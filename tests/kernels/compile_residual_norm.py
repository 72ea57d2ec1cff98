"""Compile the kernels of the residual norm and of the dropout for an NVIDIA GPU, on any machine.

Run by `test_residual_norm_contract.py`. `python compile_residual_norm.py CAPABILITY DTYPE WIDTH` compiles them for
branches of this dtype and streams of it and of float32, with the pinned tiles. It prints one JSON object: for each its
registers, bytes of stack (spills) and of shared memory, whether it waits for earlier kernels, and how many reads and
writes of memory and how many multiplications of random numbers it has. Needs TRITON_INTERPRET=0: with the interpreter
chosen, kernels are plain Python.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import triton
from compile_attention import resources
from compile_max_pool import accesses
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels import column_sums
from fastmetro_kernels.dropout import triton as dropout
from fastmetro_kernels.residual_norm import triton as norm
from fastmetro_kernels.residual_norm.plan import pinned, plan

STREAMS = {"stream", "new_stream", "x", "more", "grad_stream"}
BRANCHES = {"branch", "normed", "grad", "grad_branch", "out", "grad_x"}
VECTORS = {"weight", "bias", "branch_bias", "mean", "inverse", "partials", "first", "second", "third"}


def source(kernel: Any, dtype: str, stream: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch gives it."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = f"*{stream}" if name in STREAMS else f"*{dtype}" if name in BRANCHES else "i32"
        kind = "*fp32" if name in VECTORS else "*i64" if name == "seed" else kind
        kind = "fp32" if name in ("epsilon", "scale") else kind
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (kind.startswith("*") or name in ("width", "count")):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def jobs(width: int, dtype: str) -> list[tuple[str, Any, str, int, dict[str, Any]]]:
    """Names, kernels, the dtype of their stream, their warps and what is fixed of them."""
    found: list[tuple[str, Any, str, int, dict[str, Any]]] = []
    for backward in (False, True):
        tile = plan(14240, width, backward, pinned(width, backward))
        constants: dict[str, Any] = {"ROWS": tile.rows, "BLOCK": tile.block, "DROPS": True}
        for stream, shared, biased in itertools.product((dtype, "fp32"), (False, True), (False, True)):
            flags = constants | {"BIASED": biased}
            if backward:
                flags |= {"NORMED": True, "MORE": not shared, "SPLIT": True} | ({"more": None} if shared else {})
                label = f"backward {stream}{' final' * shared}{' biased' * biased}"
                found.append((label, norm.residual_norm_backward_kernel, stream, tile.warps, flags))
            else:
                flags |= {"BRANCH": True, "SHARED": shared} | ({} if biased else {"branch_bias": None})
                label = f"forward {stream}{' shared' * shared}{' biased' * biased}"
                found.append((label, norm.residual_norm_kernel, stream, tile.warps, flags))
    for count in (1, 2, 3):
        flags = {"COUNT": count, "PARTS": column_sums.PARTS, "COLUMNS": column_sums.COLUMNS}
        flags |= dict.fromkeys(("second", "third")[count - 1 :])
        found.append((f"join {count}", column_sums.column_sums_kernel, dtype, column_sums.WARPS, flags))
    return found + relu_jobs(width, dtype)


def relu_jobs(width: int, dtype: str) -> list[tuple[str, Any, str, int, dict[str, Any]]]:
    """Those of the dropout, in a line and with a bias."""
    columns = dropout.columns_of(width)
    line = {"BLOCK": dropout.BLOCK, "DROPS": True}
    tile, summed = ({"ROWS": many // columns, "COLUMNS": columns} for many in (dropout.BLOCK, dropout.SUMMED))
    return [
        ("relu", dropout.relu_dropout_kernel, dtype, dropout.WARPS, line),
        ("relu_biased", dropout.biased_relu_dropout_kernel, dtype, dropout.BIASED_WARPS, tile | {"DROPS": True}),
        ("relu_back", dropout.relu_dropout_backward_kernel, dtype, dropout.WARPS, line),
        ("relu_back biased", dropout.biased_relu_dropout_backward_kernel, dtype, dropout.WARPS, summed),
    ]


def main() -> None:
    capability, dtype, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    early = capability >= 90
    report = {}
    for name, kernel, stream, warps, constants in jobs(width, dtype):
        fixed = {key: value for key, value in (constants | {"EARLY": early}).items() if key in kernel.arg_names}
        options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
        compiled = triton.compile(
            source(kernel, dtype, stream, fixed), target=GPUTarget("cuda", capability, 32), options=options
        )
        ptx = compiled.asm["ptx"]
        report[name] = resources(compiled) | {"waits": "griddepcontrol.wait" in ptx} | accesses(ptx)
        report[name]["mul_hi"] = ptx.count("mul.hi.u32") + ptx.count("mul.wide.u32")
        report[name]["barriers"] = ptx.count("bar.sync")
        print(name, report[name], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
