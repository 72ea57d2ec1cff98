"""``python -m fastmetro_kernels.info``: what is installed, which backends run here, and what mends the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

import fastmetro_kernels
from fastmetro_kernels import backends, tuning
from fastmetro_kernels.attention import dispatch
from fastmetro_kernels.attention.configs import PASSES
from fastmetro_kernels.convolution import choice as convolution_choice
from fastmetro_kernels.convolution import native as convolution_native
from fastmetro_kernels.convolution.join import FAMILY as JOIN_FAMILY
from fastmetro_kernels.convolution.join_configs import MEASURED as MEASURED_JOINS
from fastmetro_kernels.convolution.table import Family as ConvolutionFamily
from fastmetro_kernels.fused.decoder_tail import native as tail_native
from fastmetro_kernels.fused.linear import native as linear_native

OPS = {
    "topology_attention": ("attention_forward_native", ("reference", "native", "triton")),
    "sparse_upsample": ("upsample_native", ("reference", "native", "triton")),
    "rasterize": ("rasterize_native", ("reference", "native")),
    "fused_linear": (linear_native.OPERATOR, ("reference", "native", "triton")),
    "short_attention": ("", ("reference", "triton")),
    "normalize_rows": ("", ("reference", "triton")),
    "decoder_tail": (tail_native.OPERATOR, ("reference", "native", "triton")),
    "normalize_pixels": ("", ("reference", "triton")),
    "render_crops": ("", ("reference", "triton")),
    "to_channels_last": ("", ("reference", "triton")),
    "batch_norm": ("", ("reference", "triton")),
    "max_pool": ("", ("reference", "triton")),
    "residual_norm": ("", ("reference", "triton")),
    "relu_dropout": ("", ("reference", "triton")),
    "image_weight_gradient": ("", ("reference", "triton")),
    "adamw": ("", ("reference", "triton")),
    "convolution": (convolution_native.OPERATOR, ("reference", "native")),
    "convolution_join": ("", ("reference", "triton")),
}
"""The public ops: the operator whose presence tells of native kernels (if there are any), and the backends."""

CUDA_OPERATORS = {"topology_attention": "attention_forward_cuda"}
"""Where the native kernels of CUDA tensors are of another operator."""

SIMD_LEVELS = ("baseline", "avx2", "avx512")
"""Values of the environment variable FASTMETRO_SIMD (`csrc/common/simd.h`)."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def backend_reasons(op: str, backend: str, device: torch.device) -> list[str]:
    """Why ``backend`` of ``op`` cannot run on tensors of ``device``; empty when it can.

    Args:
        op: Name of a public op, a key of :data:`OPS`.
        backend: ``"reference"``, ``"native"`` or ``"triton"``.
        device: The device whose tensors are asked about.
    """
    if backend == "triton":
        return backends.triton_reasons(device)
    if op in ("convolution", "fused_linear", "decoder_tail") and backend == "native":
        return backends.hopper_reasons(OPS[op][0], device, torch.float16)
    if backend == "native":
        operator = CUDA_OPERATORS.get(op, OPS[op][0]) if device.type == "cuda" else OPS[op][0]
        return backends.native_reasons(operator, device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    return []


def remedy() -> str | None:
    """The command that mends what is missing here, or None when nothing is."""
    if backends.native_cpu_reasons():
        return f"{backends.build_command()}   (compiles the C++ kernels; needs g++)"
    if torch.version.cuda is not None and torch.cuda.is_available() and backends.native_cuda_reasons():
        return f"{backends.build_command()}   (compiles the CUDA kernels; needs nvcc on the PATH or CUDA_HOME)"
    if importlib.util.find_spec("triton") is None and platform.system() == "Linux":
        return "pip install triton"
    return None


def choices() -> list[str]:
    """How `backend="auto"` chooses: the measured families, and the orders where nothing was measured."""
    orders = f"GPU: {', '.join(dispatch.ORDER_CUDA)}; CPU: {', '.join(dispatch.ORDER_OTHER)}"
    lines = ["", 'what backend="auto" takes', f"  topology_attention without a measurement, in this order: {orders}"]
    try:
        families = tuning.families()
    except tuning.TuningFileError as error:
        return [*lines, f"  {error}"]
    here = {tuning.family_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    for name in sorted(here - families.keys() - {None}, key=str):
        lines.append(f"  topology_attention, compute capability {name}: no measurement for this device family")
    for name, family in sorted(families.items()):
        record = family.record
        lines += [
            f"  topology_attention, compute capability {name}{' (this device)' if name in here else ''}: measured on "
            f"{record['device']}, torch {record['torch']}, triton {record['triton']}, {record['date']}, "
            f"commit {record['commit']}",
            "    milliseconds of the fastest configuration of each backend; sdpa and reference are not taken",
        ]
        for point in sorted(family.points, key=lambda point: (PASSES.index(point.pass_name), point.key)):
            times = ", ".join(f"{one.backend} {one.milliseconds:.4f}" for one in dispatch.runners_up(point))
            lines.append(
                f"    {point.pass_name:8} {point.dtype:8} head dim {point.dim:3}, {point.vertices:5} vertices, "
                f"batch * heads {point.batch_heads:4}: {times}"
            )
    lines += [
        "  sparse_upsample: native, then triton, then reference; its kernels choose by shape in "
        "csrc/upsampling/launch.h",
        "  rasterize: native, then reference",
        "  fused_linear, short_attention, normalize_rows, decoder_tail (inference only), batch_norm: triton, then "
        "reference; by shape in fused/*/configs.py and batch_norm/plan.py",
        "  decoder_tail: native where it can take a call, on compute capability 9.0",
        f"  fused_linear: native for {len(linear_native.MEASURED)} measured sizes on compute capability "
        f"{linear_native.FAMILY}; by size in fused/linear/native.py",
        *convolution_choices(),
    ]
    if path := os.environ.get(tuning.ENVIRONMENT):
        lines.append(f"  {tuning.ENVIRONMENT}={path} takes the place of the shipped table for the families in it")
    return lines


def convolution_choices() -> list[str]:
    """How `backend="auto"` chooses for convolutions: what was measured, and the rule where nothing was."""
    rule = f"up to {convolution_choice.MOST_IMAGES} images and {convolution_choice.MOST_ROWS} output positions"
    lines = [f"  convolution (inference only) without a measurement: native {rule}, else reference"]
    lines.append(
        f"  convolution_join (inference only): triton for {len(MEASURED_JOINS)} measured layers on compute capability "
        f"{JOIN_FAMILY}, else reference; by shape in convolution/join_configs.py"
    )
    try:
        families = convolution_choice.families()
    except tuning.TuningFileError as error:
        return [*lines, f"  {error}"]
    for name, family in sorted(families.items()):
        record = family.record
        lines += [
            f"  convolution, compute capability {name}: measured on {record['device']}, torch {record['torch']}, "
            f"{record['date']}, commit {record['commit']}",
            *_measured_convolutions(family),
        ]
    if path := os.environ.get(convolution_choice.ENVIRONMENT):
        name = convolution_choice.ENVIRONMENT
        lines.append(f"  {name}={path} takes the place of the shipped table for the families in it")
    return lines


def _measured_convolutions(family: ConvolutionFamily) -> list[str]:
    """One line per number of images, and one for each layer that the library takes."""
    lines = []
    for images in sorted({entry.layer.images for entry in family.entries}):
        entries = [entry for entry in family.entries if entry.layer.images == images and not entry.layer.following]
        pairs = [entry for entry in family.entries if entry.layer.images == images and entry.layer.following]
        library = sorted((entry for entry in entries if entry.config is None), key=lambda entry: entry.layer)
        taken = len(entries) - len(library)
        lines.append(f"    {images} images: native for {taken} of {len(entries)} measured layers, else the library")
        if pairs:
            fused = sum(entry.config is not None for entry in pairs)
            lines.append(f"      one kernel for {fused} of {len(pairs)} measured pairs of them")
        for entry in library:
            times = f"{entry.library_us:.2f} microseconds, native {entry.native_us:.2f}"
            lines.append(f"      library: {entry.layer}: {times}")
    return lines


def report() -> str:
    """The whole report as text."""
    lines = [f"fastmetro_kernels {fastmetro_kernels.__version__}", "", "versions"]
    lines += [f"  {name:10} {_version(name)}" for name in ("torch", "triton", "numpy", "scipy")]
    lines += [
        f"  {'python':10} {platform.python_version()}",
        f"  {'CUDA':10} {torch.version.cuda or 'none in this PyTorch'}",
    ]
    lines += [
        "",
        "devices",
        f"  cpu        {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"  cuda:{index}     {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        lines.append("  cuda       none is visible")
    for op, (_, names) in OPS.items():
        lines += ["", op]
        for device in (torch.device("cpu"), torch.device("cuda")):
            for name in names:
                reasons = backend_reasons(op, name, device)
                lines.append(f"  {device.type:5} {name:10} {'yes' if not reasons else 'no: ' + '; '.join(reasons)}")
    lines += choices()
    command = remedy()
    lines += ["", f"to mend: {command}" if command else "nothing is missing"]
    if cap := os.environ.get("FASTMETRO_SIMD"):
        known = cap in SIMD_LEVELS
        effect = "caps the CPU kernels' instruction set" if known else f"is ignored; accepted: {', '.join(SIMD_LEVELS)}"
        lines.append(f"FASTMETRO_SIMD={cap} {effect}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
