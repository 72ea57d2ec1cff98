"""`make sanitize`: compute-sanitizer's memcheck, racecheck and initcheck over small cases of every CUDA op.

One line per tool and group of cases (`tools/sanitize_cases.py`), each in a process of its own, or in several that run
beside one another (`--shards`); details of findings are printed and kept in a folder. PyTorch's caching allocator is
switched off, because it would hide accesses out of bounds. First every group runs without a tool, which also compiles
the Triton kernels. Then, where nvcc is there, a program with a mistake on purpose shows for each tool that it sees.

Exit status: 0 nothing was found; 1 something was found or did not run to its end; 3 this machine cannot run it (no
GPU, no compute-sanitizer, no CUDA extension). compute-sanitizer is part of the CUDA toolkit; `pip install
nvidia-cuda-sanitizer-api` brings it, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CASES = ROOT / "tools" / "sanitize_cases.py"
PLANTED = ROOT / "tools" / "sanitize_planted.cu"

CLEAN, FOUND, CANNOT_RUN = 0, 1, 3
TOOLS: dict[str, tuple[str, ...]] = {
    # Errors of API calls are PyTorch's to raise; it also makes some on purpose, to ask what a pointer is.
    "memcheck": ("--padding", "512", "--report-api-errors", "no"),
    "racecheck": (),
    "initcheck": (),
}
GROUPS = (
    "attention-native",
    "attention-triton",
    "upsampling-native",
    "upsampling-triton",
    "rasterization-native",
    "convolution-native",
    "convolution-cluster-native",
    "linear-native",
    "linear-cluster-native",
)
_REDUCTIONS = "Triton's reductions write one word from several lanes, which is reported (triton issue 7264)"
_CLUSTERS = "under the tool the first convolution by a cluster had not ended after 250 s"
LEFT_OUT = {
    **{("racecheck", group): _REDUCTIONS for group in GROUPS if group.endswith("triton")},
    **{("racecheck", group): _CLUSTERS for group in GROUPS if group.endswith("cluster-native")},
}
SECONDS = 300
FOUND_STATUS = 66
LOG = "sanitize.log"
# Beyond the print limit a second line says how many of the errors "were not printed": those are counted already.
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?\b(?! were not)|RACECHECK SUMMARY: (\d+) hazards? displayed)")


@dataclass(frozen=True)
class Outcome:
    """Of one process."""

    cases: int | None
    """None: it did not run to its end."""
    findings: int | None
    """None: the tool printed no summary."""
    output: str
    seconds: float

    @property
    def clean(self) -> bool:
        return bool(self.cases) and self.findings == 0

    def __str__(self) -> str:
        left_out = self.output.count("\nleft out:") + self.output.startswith("left out:")
        text = "clean" if self.clean else "FAILED" if self.findings in (0, None) else f"{self.findings} FINDINGS"
        cases = "did not run to its end" if self.cases is None else f"{self.cases} cases"
        return f"{text:<12} {cases}{f' ({left_out} left out)' if left_out else ''}, {self.seconds:.1f} s"


def find_tool() -> str | None:
    """compute-sanitizer: on the PATH, in the toolkit, or in the package from PyPI."""
    candidates = [shutil.which("compute-sanitizer")]
    candidates += [f"{home}/bin/compute-sanitizer" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    candidates += [str(path) for entry in sys.path for path in Path(entry).glob("nvidia/*/bin/compute-sanitizer")]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def find_nvcc() -> str | None:
    """nvcc: on the PATH or in the usual place."""
    usual = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def missing() -> list[str]:
    """Why nothing can be sanitized here; empty if it can."""
    from fastmetro_kernels import backends

    found = [f"CUDA extension: {why}" for why in backends.native_cuda_reasons()]
    if find_tool() is None:
        found.append("no compute-sanitizer: install the CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api`")
    return found


def environment(folder: Path) -> dict[str, str]:
    """For the processes with the cases."""
    return {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_INTERPRET": "0",
    }


def run(command: list[str], sanitized: bool, folder: Path) -> Outcome:
    """Run one process to its end, at most five minutes."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + f"\nstopped after {SECONDS} s\n"
    return outcome(output, process.returncode, sanitized, time.monotonic() - start)


def outcome(output: str, status: int, sanitized: bool, seconds: float) -> Outcome:
    """What a process says, read from its output and exit status."""
    said = re.search(r"^cases: (\d+)", output, re.MULTILINE)
    counts = [int(first or second) for first, second in SUMMARY.findall(output)]
    findings = sum(counts) if counts else None if sanitized else 0
    finished = said and status in ({0, FOUND_STATUS} if sanitized else {0})
    if status == FOUND_STATUS and findings == 0:
        findings = None  # it found something that this program does not know how to count
    return Outcome(int(said[1]) if said and finished else None, findings, output, seconds)


def command(tool: str, target: list[str]) -> list[str]:
    """compute-sanitizer around a program."""
    # The target itself only: compiling Triton's kernels starts compilers.
    options = (
        "--target-processes",
        "application-only",
        "--launch-timeout",
        "120",
        "--error-exitcode",
        str(FOUND_STATUS),
    )
    return [str(find_tool()), "--tool", tool, *options, "--print-limit", "20", *TOOLS[tool], *target]


def report(name: str, group: str, result: Outcome, expected: bool, folder: Path) -> None:
    """One line, and where it is not as expected the beginning of the output; all of it goes to the log."""
    line = f"{name:<10} {group:<22} {result}"  # group: or a part of it
    print(line, flush=True)
    with (folder / LOG).open("a") as log:
        log.write(f"---- {line}\n{result.output}\n")
    if not expected:
        lines = result.output.splitlines()
        print("\n".join(f"    {line}" for line in lines[:60]), flush=True)
        if len(lines) > 60:
            print(f"    ... {len(lines) - 60} more lines in {LOG}", flush=True)


def check_plain(groups: list[str], device: str, jobs: int, folder: Path) -> dict[str, Outcome]:
    """What all cases do without a tool, by group; compiles the Triton kernels."""
    targets = [[sys.executable, str(CASES), group, "--device", device] for group in groups]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda target: run(target, False, folder), targets))
    for group, result in zip(groups, results, strict=True):
        report("(plain)", group, result, result.clean, folder)
    return dict(zip(groups, results, strict=True))


def parts_of(plain: dict[str, Outcome], shards: int) -> dict[str, int]:
    """Into how many parts each group is split: no more than it has cases, since a part without any proves nothing."""
    return {group: min(shards, result.cases or 1) for group, result in plain.items()}


def check_planted(tools: list[str], folder: Path) -> bool:
    """Whether each tool finds the mistake on purpose; where nvcc is missing that is said and not held against it."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: no program with a mistake on purpose shows that the tools see", flush=True)
        return True
    program = folder / "sanitize_planted"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulation'}"]
    flags = ["-std=c++20", "-arch=native", "-lineinfo", *includes]
    subprocess.run([nvcc, *flags, str(PLANTED), "-o", str(program)], check=True)
    seen = True
    for tool in tools:
        result = run(command(tool, [str(program), tool]), True, folder)
        found = bool(result.findings)
        report(tool, "mistake on purpose", result, found, folder)
        seen &= found
    return seen


def check_sanitized(tools: list[str], groups: dict[str, int], jobs: int, folder: Path) -> bool:
    """Whether no tool finds anything in any group; `groups`: and into how many parts each is split."""
    todo = []
    for tool, (group, parts) in itertools.product(tools, groups.items()):
        if (tool, group) in LEFT_OUT:
            print(f"{tool:<10} {group:<22} left out: {LEFT_OUT[tool, group]}", flush=True)
            continue
        for part in range(1, parts + 1):
            name, options = (f"{group} {part}/{parts}", ["--part", str(part), str(parts)]) if parts > 1 else (group, [])
            todo.append((tool, name, command(tool, [sys.executable, str(CASES), group, *options])))
    with ThreadPoolExecutor(jobs) as pool:
        clean = True
        results = pool.map(lambda job: run(job[2], True, folder), todo)
        for (tool, name, _), result in zip(todo, results, strict=True):
            report(tool, name, result, result.clean, folder)
            clean &= result.clean
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--jobs", type=int, default=4, help="processes that run at once on the GPU (default 4)")
    parser.add_argument("--shards", type=int, default=1, help="parts of each group, each in a process of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "sanitize", help=f"folder of {LOG}")
    arguments = parser.parse_args()
    if arguments.shards < 1:
        parser.error(f"--shards must be at least 1, got {arguments.shards}")
    if reasons := missing():
        print("cannot sanitize here:", *reasons, sep="\n  ")
        return CANNOT_RUN
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / LOG).unlink(missing_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain = check_plain(arguments.groups, "cuda", arguments.jobs, folder)
        good = all(result.clean for result in plain.values())
        good &= check_planted(arguments.tools, folder)
        good &= check_sanitized(arguments.tools, parts_of(plain, arguments.shards), arguments.jobs, folder)
        shutil.copy(folder / LOG, arguments.out / LOG)
    print(f"{'nothing was found' if good else 'NOT CLEAN, see above'} ({time.monotonic() - start:.0f} s)")
    return CLEAN if good else FOUND


if __name__ == "__main__":
    sys.exit(main())
