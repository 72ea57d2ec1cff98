"""Compile the batch norm's kernels for an NVIDIA GPU, on any machine; run by `test_batch_norm.py`.

`python compile_batch_norm.py CAPABILITY DTYPE CHANNELS` compiles them with the tiles of ResNet-50's layers. It prints
one JSON object: for each its registers, bytes of stack (spills) and of shared memory, whether it waits for earlier
kernels, and whether it moves 16 bytes at a time. Needs TRITON_INTERPRET=0: with the interpreter chosen, kernels are
plain Python.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_attention import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmetro_kernels.batch_norm import triton_backward, triton_forward, triton_joint
from fastmetro_kernels.batch_norm.plan import CHANNELS, plan
from fastmetro_kernels.batch_norm.triton_shared import parts_at_a_time

IMAGES = {"x", "residual", "out", "grad", "more", "grad_x", "grad_residual", "behind"}
_OF_A_NORM = {"weight", "bias", "mean", "variance"}
VECTORS = (
    {"partials", "running_mean", "running_var", "grad_weight", "grad_bias"}
    | {"grad_residual_weight", "grad_residual_bias"}
    | _OF_A_NORM
    | {f"residual_{name}" for name in _OF_A_NORM}
)
ROWS = (401408, 100352, 25088, 6272, 1568)
"""Positions of ResNet-50's layers in 32 images."""


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch gives it."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = f"*{dtype}" if name in IMAGES else "*fp32" if name in VECTORS else "i32"
        kind = "*i32" if name == "counters" else kind
        kind = "*u8" if name == "bits" else kind
        kind = "*i64" if name == "batches" else "fp32" if name in ("epsilon", "residual_epsilon", "momentum") else kind
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (signature[name].startswith("*") or name == "channels"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)


def jobs() -> list[tuple[str, Any, dict[str, Any]]]:
    """Names, kernels and what is fixed of them beside the tile."""
    flags: dict[str, Any] = {"RUNNING": True, "COUNTED": True, "TILES": triton_forward.TILES}
    found: list[tuple[str, Any, dict[str, Any]]] = [("moments", triton_forward.batch_norm_moments_kernel, flags)]
    for residual in (False, True):
        absent: dict[str, Any] = {} if residual else {"residual": None, "bits": None}
        flags = {"RESIDUAL": residual, "RELU": True, "BITS": residual, **absent}
        found.append((f"norm {'residual' * residual}", triton_forward.batch_norm_kernel, flags))
        absent = {} if residual else {"bits": None, "more": None, "behind": None}
        tiles = triton_backward.TILES_WITH_MORE if residual else triton_backward.TILES
        flags = {"MORE": residual, "RELU": True, "BITS": residual, "BEHIND": residual, "TILES": tiles, **absent}
        found.append((f"backward_sums {'residual' * residual}", triton_backward.batch_norm_backward_sums_kernel, flags))
        flags = {"MORE": False, "RELU": not residual, "more": None}
        found.append((f"backward {'residual' * residual}", triton_backward.batch_norm_backward_kernel, flags))
    flags = {"RELU": True, "BITS": True}
    found.append(("joint", triton_joint.batch_norm_joint_kernel, flags))
    flags = {"MORE": True, "BITS": True, "BEHIND": True, "TILES": triton_joint.TILES}
    found.append(("joint_sums", triton_joint.batch_norm_joint_sums_kernel, flags))
    found.append(("joint_backward", triton_joint.batch_norm_joint_backward_kernel, {}))
    return found


def main() -> None:
    capability, dtype, channels = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    early = capability >= 90
    tiles = dict.fromkeys((one.rows, one.warps) for one in (plan(rows, channels) for rows in ROWS))
    report = {}
    for rows, warps in tiles:
        for name, kernel, flags in jobs():
            parts = parts_at_a_time(warps, 3 if name == "joint_sums" else 2)
            constants = {"ROWS": rows, "CHANNELS": CHANNELS, "PARTS": parts, "EARLY": early, **flags}
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
            compiled = triton.compile(
                source(kernel, dtype, constants), target=GPUTarget("cuda", capability, 32), options=options
            )
            ptx = compiled.asm["ptx"]
            label = f"{name} {rows} x {CHANNELS}"
            report[label] = resources(compiled) | {"waits": "griddepcontrol.wait" in ptx, "wide": ".v4.b32" in ptx}
            print(label, report[label], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
