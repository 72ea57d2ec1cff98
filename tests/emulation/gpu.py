"""Compiles the example kernels of the emulator's tests with nvcc, and runs them on a GPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from emulation import build

SOURCE = Path(__file__).with_name("on_gpu.cu")


def nvcc() -> str | None:
    """The compiler of the toolkit whose headers the emulator uses."""
    headers = build.find_cuda_headers()
    found = headers.parent / "bin" / "nvcc" if headers else None
    return str(found) if found and found.is_file() else None


def compile_kernels(*flags: str) -> None:
    """Run nvcc on ``on_gpu.cu``.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    command = [str(nvcc()), "-std=c++20", "-O3", f"-I{build.CSRC}", *flags, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/on_gpu.so"
        compile_kernels("-arch=native", "-shared", "-Xcompiler", "-fPIC", "-o", path)
        library = ctypes.CDLL(path)
    library.error_text.restype = ctypes.c_char_p
    return library


def run(function: str, arrays: tuple[np.ndarray, ...], *sizes: int) -> list[np.ndarray]:
    """Call a function of ``on_gpu.cu`` with copies of the arrays; returns what became of them."""
    tensors = [torch.from_numpy(x.copy().view(np.uint8)).cuda() for x in arrays]
    torch.cuda.synchronize()
    status = _library()[function](*[ctypes.c_void_p(x.data_ptr()) for x in tensors], *map(ctypes.c_int, sizes))
    if status:
        raise RuntimeError(_library().error_text(status).decode())
    return [x.cpu().numpy().view(y.dtype).reshape(y.shape) for x, y in zip(tensors, arrays, strict=True)]
