"""sparse_upsample under everything that differentiates, traces, compiles or captures it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_upsampling import (  # noqa: F401  (one_thread is a fixture)
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    ROOT,
    check_product,
    on_every_backend,
    one_thread,
    random_matrix,
)
from torch import Tensor, nn

from fastmetro_kernels import SparseMatrix, sparse_upsample
from fastmetro_kernels.upsampling import ops

EVEN, UNEVEN = random_matrix(11, 7, 3), random_matrix(9, 7, (0, 6))


class Upsample(nn.Module):
    def __init__(self, matrix: SparseMatrix, backend: str) -> None:
        super().__init__()
        self.matrix, self.backend = matrix, backend

    def forward(self, x: Tensor) -> Tensor:
        return 2 * sparse_upsample(x * 0.5, self.matrix, backend=self.backend)


def randn(*shape: int, device: str = "cpu", dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype).to(device)


@on_every_backend
@pytest.mark.parametrize("matrix", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_derivatives_of_every_order(backend: str, device: str, matrix: SparseMatrix) -> None:
    matrix = matrix.to(device)
    exact = matrix.to_dense(DOUBLE)
    x = randn(2, 7, 3, device=device).requires_grad_()
    grad = randn(2, matrix.shape[0], 3, device=device).requires_grad_()
    (first,) = torch.autograd.grad(sparse_upsample(x, matrix, backend=backend), x, grad, create_graph=True)
    direction = randn(2, 7, 3, device=device).requires_grad_()
    (second,) = torch.autograd.grad(first, grad, direction, create_graph=True)  # the product again
    (third,) = torch.autograd.grad(second, direction, grad.detach())
    torch.testing.assert_close(first.double(), exact.T @ grad.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.double(), exact @ direction.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(third.double(), exact.T @ grad.double(), rtol=1e-5, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("matrix", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_gradcheck(backend: str, device: str, matrix: SparseMatrix) -> None:
    if backend == "triton" or (backend == "native" and device == "cuda"):
        pytest.skip("needs float64")
    matrix = matrix.to(device)
    x = randn(2, 7, 2, device=device, dtype=DOUBLE).requires_grad_()

    def product(x: Tensor) -> Tensor:
        return sparse_upsample(x, matrix, backend=backend) ** 2

    assert torch.autograd.gradcheck(product, x)
    assert torch.autograd.gradgradcheck(product, x)


@on_every_backend
@pytest.mark.parametrize("matrix", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_opcheck(backend: str, device: str, matrix: SparseMatrix) -> None:
    if backend == "reference":
        pytest.skip("the reference is no op of its own")
    op = {"native": ops.upsample_native, "triton": ops.upsample_triton}[backend]
    m = matrix.to(device)
    for x in (randn(2, 7, 3, device=device), randn(1, 7, 4, device=device, dtype=HALF).expand(3, -1, -1)):
        torch.library.opcheck(op, (x, m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.shape[0]))
        torch.library.opcheck(op, (x, m.row_offsets, m.columns, m.values, None, None, m.shape[0]))
    with pytest.raises(RuntimeError, match="row_offsets"):
        op(x, m.row_offsets, m.columns, m.values, None, None, m.shape[0] + 1)
    with pytest.raises(RuntimeError, match="values"):
        op(x.float(), m.row_offsets, m.columns, m.values64, None, None, m.shape[0])
    with pytest.raises(RuntimeError, match="columns"):
        op(x, m.row_offsets, m.columns.long(), m.values, None, None, m.shape[0])


@on_every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend: str, device: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    module = Upsample(UNEVEN, backend).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = randn(batch, 7, 3, device=device).requires_grad_()
        plain, traced = module(x), compiled(x)
        torch.testing.assert_close(traced, plain, rtol=0, atol=0)
        grads = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (plain, traced)]
        torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), plain, rtol=0, atol=0)


@on_every_backend
def test_compile_with_inductor(backend: str, device: str) -> None:
    if backend == "reference" and device == "cpu":
        pytest.skip("inductor would call the C++ compiler for long")
    torch._dynamo.reset()
    module = Upsample(EVEN, backend).to(device)
    x = randn(2, 7, 3, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=0, atol=0)


@on_every_backend
def test_export(backend: str, device: str) -> None:
    module = Upsample(EVEN, backend).to(device)
    x = randn(2, 7, 3, device=device)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = randn(5, 7, 3, device=device)
    torch.testing.assert_close(exported.module()(x), module(x), rtol=0, atol=0)


@on_every_backend
def test_autocast_leaves_the_dtype(backend: str, device: str) -> None:
    module = Upsample(EVEN, backend).to(device)
    x = randn(2, 7, 3, device=device)
    with torch.autocast(device, dtype=BFLOAT):
        out = module(x)
    assert out.dtype == FLOAT
    torch.testing.assert_close(out, module(x), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("matrix", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_cuda_graph_replay(backend: str, matrix: SparseMatrix) -> None:
    matrix = matrix.to("cuda")
    x = randn(4, 7, 3, device="cuda").requires_grad_()
    grad = randn(4, matrix.shape[0], 3, device="cuda")

    def run() -> tuple[Tensor, Tensor]:
        out = sparse_upsample(x, matrix, backend=backend)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=generator))
            grad.copy_(torch.randn(grad.shape, generator=generator))
        graph.replay()
        check_product(captured[0], matrix, x.detach())
        check_product(captured[1], matrix, grad, transposed=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_device_that_is_not_the_current_one(backend: str) -> None:
    matrix = EVEN.to("cuda:1")
    x = randn(2, 7, 3, device="cuda:1")
    check_product(sparse_upsample(x, matrix, backend=backend), matrix, x)


def compile_kernels() -> None:
    """Compiles the Triton kernels for compute capability 9.0, which needs no GPU; run in a fresh interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastmetro_kernels.upsampling import triton as kernels

    def build(kernel: Callable, element: str, constants: dict[str, int]) -> None:
        pointers = {"x_ptr": f"*{element}", "out_ptr": f"*{element}", "values_ptr": "*fp32"}
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "*i32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

    for element, batch, entries, wide in (("fp32", 1, 5, False), ("bf16", 32, 74, False), ("fp16", 8, 12, True)):
        constants = dict(zip(("BATCH_TILE", "POSITION_TILE"), kernels.ell_tiles(batch), strict=True))
        build(kernels.ell_kernel, element, {**constants, "WIDTH": 3, "WIDE": wide})
        names = ("BATCH_TILE", "POSITION_TILE", "ENTRY_TILE")
        constants = dict(zip(names, kernels.csr_tiles(batch, 1, entries), strict=True))
        build(kernels.csr_kernel, element, {**constants, "WIDE": wide})


def test_triton_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the triton package is not installed")
    code = "import test_upsampling_tracing; test_upsampling_tracing.compile_kernels()"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
