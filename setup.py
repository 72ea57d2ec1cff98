"""Builds the extension: two shared libraries on PyTorch's stable ABI.

``_native_cpu`` holds every ``csrc/*/*.cpp`` and is always built. ``_native_cuda`` holds every ``csrc/*/*.cu`` and is
built when nvcc is found, also on a machine without a GPU and beside a CPU-only PyTorch. Neither is a Python module:
they register operators and are loaded with ``torch.ops.load_library``, so one build serves every Python version and,
through the stable ABI, every torch >= 2.10. ``torch.utils.cpp_extension`` is not used because it refuses CUDA sources
beside a CPU-only PyTorch; only torch's headers are needed here, and torch is never imported.

Environment: ``CXX``, ``CUDA_HOME``; ``FASTMETRO_NATIVE=0`` builds nothing, ``FASTMETRO_CUDA=0`` only the CPU part.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import find_torch  # noqa: E402

CSRC = ROOT / "csrc"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch that is supported
X86 = platform.machine() in {"x86_64", "AMD64"}
SIMD_FLAGS = {
    "isa_baseline": [],
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",  # PTX, for chips newer than the list
]


def find_nvcc() -> str | None:
    """The CUDA compiler: below ``CUDA_HOME`` when that is set, else on the PATH, else in the usual place."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(c) for c in candidates if c.is_file()), None)


def find_cxx() -> str:
    """The C++ compiler, or a message that says how to get one."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise SystemExit(
        "error: no C++ compiler was found (tried $CXX, g++, c++, clang++); install one, for example "
        "`apt-get install g++`, or set FASTMETRO_NATIVE=0 to install without the native kernels"
    )


class BuildNative(build_ext):
    """Compiles the objects in parallel and links them; objects newer than every source they can see are kept."""

    def build_extension(self, ext: Extension) -> None:
        torch_home = find_torch()
        if torch_home is None:
            raise SystemExit("error: PyTorch >= 2.10 was not found; install it first: `pip install torch`")
        self.torch_home = torch_home
        self.objects_dir = Path(self.build_temp) / ext.name.rpartition(".")[2]
        self.objects_dir.mkdir(parents=True, exist_ok=True)
        self.newest_header = max(
            p.stat().st_mtime for p in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), ROOT / "setup.py"]
        )
        cuda = ext.name.endswith("_cuda")
        jobs = [
            job
            for source in ext.sources
            for job in (self.cuda_jobs(Path(source)) if cuda else self.cpu_jobs(Path(source)))
        ]
        with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile(*job), jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.link(objects, target, cuda)

    def include_flags(self) -> list[str]:
        return [f"-I{CSRC}", "-isystem", str(self.torch_home / "include")]

    def cpu_jobs(self, source: Path) -> list[tuple[Path, Path, list[str]]]:
        flags = [
            find_cxx(),
            "-c",
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fopenmp-simd",
            "-Wall",
            TORCH_TARGET,
            *self.include_flags(),
        ]
        if X86:
            flags.append("-DFM_HAVE_X86")
        stem = f"{source.parent.name}_{source.stem}"
        if not source.stem.endswith("_simd"):
            return [(source, self.objects_dir / f"{stem}.o", flags)]
        levels = SIMD_FLAGS if X86 else {"isa_baseline": []}
        return [
            (source, self.objects_dir / f"{stem}_{isa}.o", [*flags, f"-DFM_SIMD_NS={isa}", *extra])
            for isa, extra in levels.items()
        ]

    def cuda_jobs(self, source: Path) -> list[tuple[Path, Path, list[str]]]:
        nvcc = find_nvcc()
        assert nvcc is not None  # the extension is only listed when nvcc was found
        flags = [
            nvcc,
            "-c",
            "-std=c++20",
            "-O3",
            "--threads",
            "2",
            "-lineinfo",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-DUSE_CUDA",
            TORCH_TARGET,
            *CUDA_TARGETS,
            *self.include_flags(),
        ]
        return [(source, self.objects_dir / f"{source.parent.name}_{source.stem}.o", flags)]

    def compile(self, source: Path, target: Path, flags: list[str]) -> str:
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, self.newest_header):
            self.announce(f"compiling {target.name}", level=2)
            self.call([*flags, str(source), "-o", str(target)])
        return str(target)

    def link(self, objects: list[str], target: Path, cuda: bool) -> None:
        libraries = self.objects_dir / "stubs"
        libraries.mkdir(exist_ok=True)
        # Empty stand-ins with the right names: the real ones are in the process by the time the result is loaded,
        # and a CPU-only torch has no libtorch_cuda.so to link to.
        for name in ("torch_cpu", "torch_cuda") if cuda else ("torch_cpu",):
            self.call(
                [
                    find_cxx(),
                    "-shared",
                    "-fPIC",
                    "-x",
                    "c++",
                    os.devnull,
                    "-o",
                    str(libraries / f"lib{name}.so"),
                    f"-Wl,-soname,lib{name}.so",
                ]
            )
        stubs = [f"-L{libraries}", "-ltorch_cpu"]
        if cuda:
            nvcc = find_nvcc()
            assert nvcc is not None
            # nvcc links, because it knows where its static runtime library lies.
            command = [
                nvcc,
                "-shared",
                "-cudart",
                "static",
                "-Xlinker",
                "--no-as-needed",
                *objects,
                *stubs,
                "-ltorch_cuda",
            ]
        else:
            command = [find_cxx(), "-shared", "-Wl,--no-as-needed", *objects, *stubs]
        command += ["-o", str(target)]
        self.call(command)

    def call(self, command: list[str]) -> None:
        """Run one tool; on failure show the command and what it printed, and stop."""
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)


def extensions() -> list[Extension]:
    """The shared libraries to build here."""
    if os.environ.get("FASTMETRO_NATIVE") == "0":
        return []
    cpp = sorted(str(p.relative_to(ROOT)) for p in CSRC.glob("*/*.cpp"))
    cuda = sorted(str(p.relative_to(ROOT)) for p in CSRC.glob("*/*.cu"))
    found = [Extension("fastmetro_kernels._native_cpu", cpp, py_limited_api=True)]
    if cuda and os.environ.get("FASTMETRO_CUDA") != "0" and find_nvcc():
        found.append(Extension("fastmetro_kernels._native_cuda", cuda, py_limited_api=True))
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
