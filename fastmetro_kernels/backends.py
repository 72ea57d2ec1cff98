"""What can run here, and the reasons why not.

Every op has up to three backends. ``reference`` is plain PyTorch and always runs. ``triton`` needs the
``triton`` package and a CUDA device (or Triton's interpreter, for tests). ``native`` is the compiled extension:
C++ for CPU tensors, CUDA C++ for CUDA tensors. A backend that cannot run says why; it never falls back silently.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

BUILD_COMMAND = "pip install ."
"""The command that builds the extension into an installed package; in a checkout see :func:`build_command`."""

_PACKAGE = Path(__file__).resolve().parent
_CPU_LIBRARY = "_native_cpu.abi3.so"
_CUDA_LIBRARY = "_native_cuda.abi3.so"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot take this input; the message lists every backend's reasons."""


def build_command() -> str:
    """The command that builds the extension where this package lies.

    In a checkout that is `make build`: `pip install .` there would fill the installed package, while Python goes on
    importing the checkout.
    """
    return "make build" if (_PACKAGE.parent / "setup.py").is_file() else BUILD_COMMAND


@functools.cache
def _load(filename: str) -> str | None:
    """Load one shared library of the extension; return why it could not be loaded, or None when it was."""
    path = _PACKAGE / filename
    if not path.is_file():
        return f"{filename} is not built; build it with `{build_command()}`"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{filename} does not load: {error}; rebuild it with `{build_command()}`"
    return None


def load_native() -> None:
    """Load whatever part of the extension is built. Never compiles; failures are kept as reasons."""
    _load(_CPU_LIBRARY)
    if torch.version.cuda is not None:
        _load(_CUDA_LIBRARY)


def native_cpu_reasons() -> list[str]:
    """Reasons why the C++ part of the extension is not usable here; empty when it is."""
    problem = _load(_CPU_LIBRARY)
    return [problem] if problem else []


def native_cuda_reasons() -> list[str]:
    """Reasons why the CUDA part of the extension is not usable here; empty when it is."""
    if torch.version.cuda is None:
        return [f"PyTorch {torch.__version__} is built without CUDA"]
    if not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    problem = _load(_CUDA_LIBRARY) or _driver_problem()
    return [problem] if problem else []


def cuda_versions() -> tuple[int, int]:
    """The CUDA major versions that the extension's CUDA part was built with and that the driver supports (0: none).

    Raises:
        OSError: the CUDA part is not built, or does not load.
    """
    built, driver = ctypes.c_int(), ctypes.c_int()
    library = ctypes.CDLL(str(_PACKAGE / _CUDA_LIBRARY))
    if error := library.fastmetro_cuda_versions(ctypes.byref(built), ctypes.byref(driver)):
        raise OSError(f"the CUDA runtime answers with error {error}")
    return built.value // 1000, driver.value // 1000


@functools.cache
def _driver_problem() -> str | None:
    """Why the driver cannot run the CUDA part, which brings its own CUDA runtime; None when it can."""
    try:
        built, driver = cuda_versions()
    except OSError as error:
        return f"{_CUDA_LIBRARY}: {error}"
    if driver >= built:
        return None
    return (
        f"{_CUDA_LIBRARY} was built with CUDA {built}, newer than this driver supports (CUDA {driver}); rebuild it "
        f"with `{build_command()}` and an nvcc of CUDA {driver}"
    )


def assumed_constant(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, but for loading all of Dynamo: a second of every import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assumed_constant
def native_reasons(operator: str, device: torch.device) -> list[str]:
    """Reasons why the extension cannot run ``operator`` on tensors of ``device``; empty when it can.

    Args:
        operator: Name of a native operator without its namespace, for example ``"upsample_native"``.
        device: The device of the tensors.
    """
    if device.type not in {"cpu", "cuda"}:
        return [f"there are no native kernels for {device.type} tensors"]
    reasons = native_cpu_reasons() if device.type == "cpu" else native_cuda_reasons()
    if not reasons and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reasons = ["the CUDA kernels need compute capability 8.0 or newer"]
    key = device.type.upper()
    if not reasons and not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmetro_kernels::{operator}", key):
        reasons = [f"the extension holds no {key} kernel for {operator}"]
    return reasons


def hopper_reasons(operator: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The same for an operator that takes half precision on CUDA devices of compute capability 9.0 alone."""
    if device.type != "cuda":
        return ["runs on CUDA devices only"]
    found = list(native_reasons(operator, device))
    if not found and torch.cuda.get_device_capability(device) != (9, 0):
        found.append(f"needs compute capability 9.0, this device has {torch.cuda.get_device_capability(device)}")
    if dtype not in (torch.float16, torch.bfloat16):
        found.append(f"takes float16 and bfloat16, got {dtype}")
    return found


@functools.cache
def _triton_import_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"the triton package is not installed (`pip install triton`; Linux only, this is {platform.system()})"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation must become a reason, not a crash at import
        return f"the triton package does not import: {error}"
    return None


def _interpreter_problem(triton_version: str, numpy_version: str) -> str | None:
    """Why this Triton's interpreter cannot run, or None: before 3.7 it relies on what NumPy 2.4 removed."""

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if numbers(triton_version) < (3, 7) and numbers(numpy_version) >= (2, 4):
        return f"the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}: install numpy<2.4"
    return None


def triton_interpreted() -> bool:
    """Whether Triton runs in its CPU interpreter (environment variable ``TRITON_INTERPRET``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on"}


@assumed_constant
def triton_reasons(device: torch.device) -> list[str]:
    """Reasons why Triton kernels cannot run on tensors of ``device``; empty when they can."""
    problem = _triton_import_problem()
    if problem:
        return [problem]
    if device.type == "cpu":
        if triton_interpreted():
            problem = _interpreter_problem(importlib.metadata.version("triton"), importlib.metadata.version("numpy"))
            return [problem] if problem else []
        return ["Triton kernels take CPU tensors only in the interpreter (set TRITON_INTERPRET=1 before importing)"]
    if device.type != "cuda":
        return [f"there are no Triton kernels for {device.type} tensors"]
    if not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0):
        return ["Triton kernels need compute capability 8.0 or newer"]
    return []


def select(op: str, requested: str, reasons: Mapping[str, Sequence[str]], order: Sequence[str]) -> str:
    """Choose the backend that runs one call of ``op``.

    Args:
        op: Name of the op, for the messages.
        requested: ``"auto"`` or the name of a backend.
        reasons: For each backend of the op, why it cannot take this input (empty when it can).
        order: The names that ``"auto"`` tries, fastest first.

    Returns:
        The name of the backend to run.

    Raises:
        ValueError: ``requested`` is not ``"auto"`` and not a backend of this op.
        BackendUnavailable: the named backend (or, for ``"auto"``, every one) cannot take this input.
    """
    if requested == "auto":
        for name in order:
            if not reasons[name]:
                return name
    elif requested not in reasons:
        accepted = ", ".join(repr(name) for name in ("auto", *reasons))
        raise ValueError(f"{op}: backend={requested!r} is not known; accepted: {accepted}")
    elif not reasons[requested]:
        return requested
    lines = [f"{op}: backend={requested!r} cannot take this input."]
    for name, why in reasons.items():
        lines.append(f"  {name}: {'; '.join(why) if why else 'can run'}")
    raise BackendUnavailable("\n".join(lines))


load_native()
