"""How the emulator's harnesses are compiled, kept and loaded."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from emulation import build

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))

# A kernel that writes past its output, and a launcher that uses the same parts of std::string as the emulator.
STRINGS = """
#include <string>

#include "common/device.cuh"

__global__ void kernel(float* out) { out[threadIdx.x + 1] = 0; }

FM_EMULATION_EXPORT int32_t run(float* out, int64_t n) {
  return fm_emulation::reported([&] {
    std::string text = "wrong: " + std::to_string(n) + std::to_string(static_cast<int>(n));
    text += std::to_string(static_cast<unsigned>(n)) + (std::string("a") + std::string("b")).substr(n);
    if (n < 0) throw fm_emulation::Error(text);
    fm_emulation::launch([&] { kernel(out); }, 1, 32, 0);
  });
}
"""

SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit
echo run >> "$(dirname "$0")/runs"
while [ "$1" != -o ]; do shift; done
printf first > "$2"; sleep 0.3; printf second >> "$2"
"""


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> build.Harness:
    source = tmp_path_factory.mktemp("strings") / "strings.cpp"
    source.write_text(STRINGS)
    return build.build_harness(source)


def test_the_emulator_runs_no_instrumented_code(strings: build.Harness) -> None:
    """Else a message of the emulator is itself an access that it complains about, without end."""
    out = build.guarded(np.zeros(32, np.float32))
    with pytest.raises(build.EmulationError, match="writes 4 bytes outside of all buffers: 1 bytes past the last"):
        strings.run("run", out, 0, writes={"a name that does not fit into a short string": out})


def test_a_harness_shares_no_code_with_other_libraries(strings: build.Harness) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    command = ["nm", "-D", "--defined-only", strings.library._name]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2::3]
    assert "run" in symbols
    assert not [symbol for symbol in symbols if symbol.startswith("_Z")]


def test_what_was_compiled_is_kept(strings: build.Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command: object, **options: object) -> None:
        raise AssertionError(f"{command} was run")

    monkeypatch.setattr(subprocess, "run", refuse)
    source = tmp_path / "strings.cpp"
    source.write_text(STRINGS)
    assert build.build_harness(source).library._name == strings.library._name


def test_one_of_many_compiles_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody sees half a file."""
    compiler = tmp_path / "compiler"
    compiler.write_text(SLOW_COMPILER)
    compiler.chmod(0o700)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    monkeypatch.setenv("FASTMETRO_EMULATION_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.cpp"
    source.write_text("int x;")
    with ThreadPoolExecutor(15) as pool:
        made = list(pool.map(lambda _: build._made(source, ".o", [], [source], []).read_text(), range(15)))
    assert made == ["firstsecond"] * 15
    assert (tmp_path / "runs").read_text() == "run\n"


def test_static_shared_memory_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "static.cpp"
    source.write_text('#include "common/device.cuh"\n__global__ void kernel() { __shared__ float x[4]; x[0] = 0; }\n')
    with pytest.raises(RuntimeError, match="the emulator knows no static shared memory"):
        build.build_harness(source)
