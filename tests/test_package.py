"""The package as a stranger meets it: what an import needs, what the info report says, what the extension is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastmetro_kernels import backends, info

ROOT = Path(__file__).resolve().parents[1]
BASE = {"torch", "triton", "numpy", "scipy", "fastmetro", "fastmetro_kernels"}
EXTRAS = ("PIL", "trimesh", "tqdm", "tyro", "matplotlib", "skimage", "safetensors", "yaml", "anny", "warp")


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that runs ``code`` in the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_and_network_need_only_the_base_packages() -> None:
    code = f"""
import sys
import zipfile
for name in {EXTRAS!r}:
    sys.modules[name] = None   # any import of it raises
import torch, fastmetro_kernels, fastmetro
mesh = fastmetro.load_mesh("anny-body")
model = fastmetro.create_model("fastmetro-s", backbone="resnet50", mesh=mesh, upsampling="fixed").eval()
with torch.no_grad():
    print(tuple(model(torch.zeros(1, 3, 224, 224))["pred_3d_vertices_fine"].shape))
"""
    assert run_python(code).strip() == "(1, 13348, 3)"


def test_import_compiles_nothing() -> None:
    """No compiler is started by importing: an audit hook sees every process that Python would start."""
    code = """
import sys
import zipfile
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        print("STARTED", event, args)
import torch
sys.addaudithook(hook)
import fastmetro_kernels, fastmetro
"""
    assert "STARTED" not in run_python(code)


def test_everything_works_without_the_extension(tmp_path: Path) -> None:
    """A copy of the package without its shared libraries says what is missing and still computes."""
    package = tmp_path / "fastmetro_kernels"
    package.mkdir()
    for source in (ROOT / "fastmetro_kernels").rglob("*.py"):
        target = package / source.relative_to(ROOT / "fastmetro_kernels")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    code = f"""
import sys
import zipfile
sys.path.insert(0, {str(tmp_path)!r})
import torch, fastmetro_kernels as fk
assert fk.__file__.startswith({str(tmp_path)!r})
from fastmetro_kernels import info
print(info.report())
t = fk.TokenTopology.from_faces([[0, 1, 2]], num_vertices=3, num_hubs=1)
q = torch.randn(1, 4, 1, 8)
fk.topology_attention(q, q, q, t)
try:
    fk.topology_attention(q, q, q, t, backend="native")
except fk.BackendUnavailable as error:
    print("REFUSED", error)
"""
    output = run_python(code)
    assert "_native_cpu.abi3.so is not built" in output
    assert backends.BUILD_COMMAND in output
    assert "REFUSED" in output


def test_info_reports_every_backend_of_every_op() -> None:
    report = info.report()
    for word in ("torch", "triton", "python", "cpu", *info.OPS):
        assert word in report
    lines = [
        line
        for line in report.splitlines()
        if line.startswith(("  cpu ", "  cuda ")) and (": " in line or "yes" in line)
    ]
    assert len(lines) >= sum(2 * len(names) for _, names in info.OPS.values())
    assert torch.__version__.split("+")[0] in report


def test_info_asks_for_operators_that_have_cuda_kernels() -> None:
    """Without a GPU here, what it would say there can be wrong unseen."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    for op, (operator, names) in info.OPS.items():
        if "native" in names:
            assert f'm.impl("{info.CUDA_OPERATORS.get(op, operator)}"' in sources, op


@pytest.mark.parametrize(
    "operator", ["attention_forward_native", "attention_backward_native", "upsample_native", "rasterize_native"]
)
def test_the_cpp_part_is_built_and_complete(operator: str) -> None:
    """`make test` builds the extension: its absence here would let every native test skip silently."""
    assert backends.native_reasons(operator, torch.device("cpu")) == []


def test_select_names_every_reason() -> None:
    reasons = {"reference": [], "native": ["not built"], "triton": ["no device", "too old"]}
    assert backends.select("op", "auto", reasons, ["native", "triton", "reference"]) == "reference"
    assert backends.select("op", "reference", reasons, ["native"]) == "reference"
    with pytest.raises(backends.BackendUnavailable, match=r"(?s)native: not built.*triton: no device; too old"):
        backends.select("op", "native", reasons, ["native"])
    with pytest.raises(ValueError, match="'cuda' is not known; accepted: 'auto', 'reference', 'native', 'triton'"):
        backends.select("op", "cuda", reasons, ["native"])


def test_extension_uses_only_the_stable_abi() -> None:
    """The shared libraries ask PyTorch for C symbols of the stable ABI alone, and for no Python symbol at all."""
    for library in (ROOT / "fastmetro_kernels").glob("_native_*.so"):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        names = [line.split()[-1] for line in symbols.stdout.splitlines()]
        foreign = [n for n in names if n.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_Py", "Py"))]
        assert foreign == []


def test_one_wheel_serves_every_python(tmp_path: Path) -> None:
    """The wheel is tagged for the limited API, and holds the libraries, the assets and no compiler's leftovers."""
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    done = subprocess.run([*command, "--bdist-dir", str(tmp_path / "tree")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastmetro_kernels/_native_cpu.abi3.so" in names
    assert {"fastmetro/assets/anny_body.npz", "fastmetro/assets/fastmetro_compact.safetensors"} <= set(names)
    assert "fastmetro_kernels/tuning/attention.json" in names
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not [name for name in names if name.endswith((".o", ".cpp", ".cu", ".pyc"))]
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"fastmetro", "fastmetro_kernels"}
