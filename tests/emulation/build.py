"""Compiles CUDA kernels as host code and runs them in the emulator, from Python.

A harness is a C++ file that includes kernel headers (``csrc/*/*.cuh``) and exports functions which launch them::

    FM_EMULATION_EXPORT int32_t run(const float* x, float* y, int64_t count) {
      return fm_emulation::reported([&] {
        fm_emulation::launch([&] { kernel<float>({x, y, count}); }, grid, threads, shared_bytes);
      });
    }

``build_harness`` compiles it, ``Harness.run`` calls such a function. What a run shows and what it cannot show is
written at the top of ``emulator.h``. Compiled files are kept below ``FASTMETRO_EMULATION_CACHE`` (default: a folder
of this user in the system's temporary folder), named by a hash of everything they were made from.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # several harnesses may be loaded into one process
    "-U_FORTIFY_SOURCE",  # its check of longjmp knows one stack only
    "-ffp-contract=off",
    "-DFM_EMULATED",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-variable",
]
INSTRUMENTED = [
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-ftrivial-auto-var-init=pattern",
]
"""Of harnesses: accesses and undefined arithmetic are announced (see hooks.cpp), and variables that were never set hold
nonsense instead of what happened to be there."""
RUNTIME = (
    "launch.cpp",
    "emulator.cpp",
    "fibers.cpp",
    "warp.cpp",
    "products.cpp",
    "barriers.cpp",
    "clocks.cpp",
    "shared_memory.cpp",
    "global_memory.cpp",
    "copy_engine.cpp",
    "hooks.cpp",
)
EXPORTS = HERE / "exports.map"
OLDEST_COMPILER = 12
MARGIN = 1024
SCHEDULES = ("forward", "reverse", "random")
RACES = ("ignored", "between_warps", "between_lanes", "by_barriers")


class EmulationError(RuntimeError):
    """A kernel did what a kernel must not do; the message names the block, the warp, the lane and the line."""


class Statistics(ctypes.Structure):
    """Counts of one ``Harness.run``; the fields are explained in ``emulator.h``."""

    blocks: int
    barriers: int
    shuffles: int
    matrix_loads: int
    matrix_wavefronts: int
    multiply_adds: int
    copies: int
    zero_fills: int
    global_read_bytes: int
    global_write_bytes: int
    cluster_barriers: int
    cluster_reads: int
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "blocks",
            "barriers",
            "shuffles",
            "matrix_loads",
            "matrix_wavefronts",
            "multiply_adds",
            "copies",
            "zero_fills",
            "global_read_bytes",
            "global_write_bytes",
            "cluster_barriers",
            "cluster_reads",
        )
    ]

    @property
    def conflict_rate(self) -> float:
        """Passes over the banks of shared memory that matrix loads need only because of conflicts, per other pass."""
        needed = 4 * self.matrix_loads
        return (self.matrix_wavefronts - needed) / needed if needed else 0.0


def find_cuda_headers() -> Path | None:
    """The toolkit's ``include``: below ``CUDA_HOME``, beside the nvcc on the PATH, or in the usual place."""
    homes = [Path(home) for home in [os.environ.get("CUDA_HOME")] if home]
    if on_path := shutil.which("nvcc"):
        homes.append(Path(on_path).resolve().parents[1])
    homes.append(Path("/usr/local/cuda"))
    return next((home / "include" for home in homes if (home / "include" / "cuda_fp16.h").is_file()), None)


def find_compiler() -> str | None:
    """g++, which knows the flags above."""
    return shutil.which("g++")


@functools.cache
def reasons() -> list[str]:
    """Why kernels cannot be emulated here; empty if they can."""
    found = []
    if find_cuda_headers() is None:
        found.append("cuda_fp16.h of a CUDA toolkit was not found (set CUDA_HOME)")
    compiler = find_compiler()
    if compiler is None:
        found.append("g++ was not found")
    else:
        version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
        if int(version.split(".")[0]) < OLDEST_COMPILER:
            found.append(f"g++ {version} is too old, {OLDEST_COMPILER} is needed")
    return found


def cache_folder() -> Path:
    """Where compiled files are kept; made on demand, for this user only."""
    default = Path(tempfile.gettempdir()) / f"fastmetro-emulation-{os.getuid()}"
    folder = Path(os.environ.get("FASTMETRO_EMULATION_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else; set FASTMETRO_EMULATION_CACHE to a folder of your own")
    return folder


@functools.cache
def _toolchain() -> str:
    """What the output depends on beside sources and flags."""
    version = subprocess.run([str(find_compiler()), "--version"], capture_output=True, text=True, check=True)
    return f"{version.stdout} {find_cuda_headers()}"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keeps other processes, and threads of this one, from making the same file; a dead process keeps nobody."""
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _made(source: Path, suffix: str, flags: list[str], inputs: list[Path], headers: list[Path]) -> Path:
    """Runs the compiler unless the same inputs and flags have been through it; returns the output."""
    digest = hashlib.sha256((_toolchain() + " ".join(flags)).encode())
    for path in [*inputs, *sorted(headers)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_folder() / f"{source.stem}-{digest.hexdigest()[:20]}{suffix}"
    if target.exists():
        return target
    # Many test processes want the same files at the same moment: one of them makes each. It appears under its name when
    # it is complete, and is never written again, for others may have it in their memory by then.
    with _locked(target):
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}{suffix}")
            command = [str(find_compiler()), *flags, *map(str, inputs), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            partial.replace(target)
    return target


def _object(source: Path) -> Path:
    runtime = source.name in RUNTIME
    headers = [*HERE.glob("*.h"), *([] if runtime else [*HERE.glob("*.cuh"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.h")])]
    includes = [f"-I{CSRC}", f"-I{HERE}", "-isystem", str(find_cuda_headers())]
    return _made(source, ".o", [*FLAGS, *([] if runtime else INSTRUMENTED), *includes, "-c"], [source], headers)


def build_harness(source: Path) -> Harness:
    """Compile a harness (at most once per content of its sources) and load it.

    Raises:
        RuntimeError: with the compiler's messages, if it does not compile.
    """
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_object, [source, *(HERE / name for name in RUNTIME)]))
    # Where the harness and the emulator both contain a function of the standard library, the linker keeps the first:
    # the emulator must not run the instrumented one, which calls the emulator.
    objects = [*objects[1:], objects[0]]
    flags = ["-shared", "-ldl", "-pthread", f"-Wl,--version-script={EXPORTS}"]
    return Harness(ctypes.CDLL(str(_made(source, ".so", flags, objects, [EXPORTS]))))


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy with room around it that belongs to no buffer, so that accesses just outside are caught.

    The copy starts at a multiple of 256 bytes, as memory from a GPU does.
    """
    room = np.full(array.nbytes + 2 * MARGIN + 256, 0xFF, np.uint8)
    start = MARGIN + -(room.ctypes.data + MARGIN) % 256
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@dataclass(frozen=True)
class Harness:
    """Functions of a compiled harness."""

    library: ctypes.CDLL

    def run(
        self,
        function: str,
        *arguments: Any,
        reads: dict[str, np.ndarray | torch.Tensor] | None = None,
        writes: dict[str, np.ndarray | torch.Tensor] | None = None,
        schedule: str = "forward",
        races: str = "between_lanes",
        seed: int = 0,
        shared_limit: int = 227 * 1024,
        cluster_size: int = 1,
    ) -> Statistics:
        """Call an exported function and return what its launches counted.

        Arguments: arrays and CPU tensors go as pointers, None as a null pointer, int as ``int64_t``, float as
        ``double``, ctypes structures as pointers to them.

        ``reads`` and ``writes`` name the global memory that kernels may touch (contiguous arrays or tensors; those of
        ``writes`` also for reading). Without both, global accesses are not checked.

        Raises:
            EmulationError: the kernel did something wrong.
        """
        self._register(reads or {}, writes or {})
        self.library.fm_emulation_configure(
            ctypes.c_int32(SCHEDULES.index(schedule)),
            ctypes.c_int32(RACES.index(races)),
            ctypes.c_uint64(seed),
            ctypes.c_int64(shared_limit),
            ctypes.c_int32(cluster_size),
        )
        try:
            failed = self.library[function](*map(_pass, arguments))
        finally:
            self.library.fm_emulation_forget_buffers()
        if failed:
            self.library.fm_emulation_last_error.restype = ctypes.c_char_p
            raise EmulationError(self.library.fm_emulation_last_error().decode())
        statistics = Statistics()
        self.library.fm_emulation_totals(ctypes.byref(statistics))
        return statistics

    def _register(
        self, reads: dict[str, np.ndarray | torch.Tensor], writes: dict[str, np.ndarray | torch.Tensor]
    ) -> None:
        for writable, buffers in ((0, reads), (1, writes)):
            for name, buffer in buffers.items():
                pointer, size = _memory(buffer)
                self.library.fm_emulation_register_buffer(
                    name.encode(), ctypes.c_void_p(pointer), ctypes.c_uint64(size), ctypes.c_int32(writable)
                )


def _memory(buffer: np.ndarray | torch.Tensor) -> tuple[int, int]:
    """Address and size in bytes."""
    if isinstance(buffer, torch.Tensor):
        return buffer.data_ptr(), buffer.untyped_storage().nbytes() - buffer.storage_offset() * buffer.element_size()
    return buffer.ctypes.data, buffer.nbytes


def _pass(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray | torch.Tensor):
        return ctypes.c_void_p(_memory(argument)[0])
    if isinstance(argument, bool | int | np.integer):
        return ctypes.c_int64(int(argument))
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    raise TypeError(f"cannot pass {type(argument).__name__} to a harness")
