"""What the package says about its backends: a build that does not load, an old GPU, and how to mend things."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmetro_kernels import backends, info

PACKAGE = Path(backends.__file__).parent
NATIVE_OPS = ("upsample_native", "rasterize_native")


@pytest.mark.parametrize("operator", NATIVE_OPS)
def test_a_built_extension_runs_here(operator: str, device: torch.device) -> None:
    """Tests of native kernels skip where those cannot run: a library that is there must not be what is amiss."""
    library = PACKAGE / f"_native_{device.type}.abi3.so"
    if not library.is_file():
        pytest.skip(f"{library.name} is not built")
    assert backends.native_reasons(operator, device) == []


def test_gpus_without_machine_code_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels are compiled for 8.0 and newer: older chips get a reason instead of a launch error."""
    monkeypatch.setattr(backends, "native_cuda_reasons", list)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, key: True)
    for capability, words in (((7, 5), ["capability 8.0"]), ((8, 0), []), ((12, 0), [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found = backends.native_reasons("upsample_native", torch.device("cuda", 0))
        assert len(found) == len(words) and all(word in why for word, why in zip(words, found, strict=True))


def test_the_remedy_fits_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout `pip install` would build a copy that Python does not import there."""
    assert backends.build_command() == "make build"
    monkeypatch.setattr(backends, "native_cpu_reasons", lambda: ["not built"])
    assert "make build" in (info.remedy() or "")
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path / "site-packages" / "fastmetro_kernels")
    assert (info.remedy() or "").startswith("pip install .")
    assert "build it with `pip install .`" in (backends._load.__wrapped__("_native_cpu.abi3.so") or "")


@pytest.mark.parametrize(("value", "words"), [("avx2", "avx2 caps"), ("sse", "sse is ignored; accepted: baseline")])
def test_the_report_tells_what_a_cap_does(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETRO_SIMD", value)
    assert words in info.report()


@pytest.mark.parametrize(
    ("driver", "words"), [(12, "newer than this driver supports (CUDA 12)"), (13, None), (14, None)]
)
def test_a_driver_older_than_the_build_is_a_reason(
    driver: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a library loads and then fails at its first launch."""
    monkeypatch.setattr(backends, "cuda_versions", lambda: (13, driver))
    problem = backends._driver_problem.__wrapped__()
    assert problem is None if words is None else words in (problem or "")


@pytest.mark.parametrize(
    ("triton", "numpy", "works"), [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)]
)
def test_an_interpreter_that_numpy_broke_is_a_reason(triton: str, numpy: str, works: bool) -> None:
    problem = backends._interpreter_problem(triton, numpy)
    assert problem is None if works else "numpy<2.4" in (problem or "")


def test_what_dynamo_takes_for_constant() -> None:
    """It is marked as PyTorch marks it."""
    ours, theirs = (mark(lambda: 1) for mark in (backends.assumed_constant, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs) != {}


def test_importing_loads_no_compiler() -> None:
    """Dynamo alone would take longer than all else beside PyTorch."""
    code = "import fastmetro, fastmetro_kernels, sys; fastmetro.compile; print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
