"""sparse_upsample against float64 on every backend, device and dtype, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmetro_kernels import BackendUnavailable, SparseMatrix, backends, sparse_upsample
from fastmetro_kernels.upsampling import api

ROOT = Path(__file__).resolve().parents[2]
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def targets() -> list:
    """Every backend on every device, skipped with its reasons where it cannot run."""
    found = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        reasons = {
            "reference": [],
            "native": backends.native_reasons("upsample_native", torch.device(device)),
            "triton": backends.triton_reasons(torch.device(device)),
        }
        for name, why in reasons.items():
            marks = [pytest.mark.skip(reason="; ".join(why))] if why else []
            found.append(pytest.param(name, device, id=f"{name}-{device}", marks=marks))
    return found


on_every_backend = pytest.mark.parametrize(("backend", "device"), targets())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small cases gain nothing from threads, and lose much on a busy machine; the tests of threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def skip_unsupported(backend: str, device: str, dtype: torch.dtype) -> None:
    if dtype == DOUBLE and (backend == "triton" or (backend == "native" and device == "cuda")):
        pytest.skip("float64 runs on reference and on the CPU kernels")
    if dtype == BFLOAT and backend == "triton" and backends.triton_interpreted():
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")


def random_matrix(rows: int, columns: int, lengths: int | tuple[int, int], seed: int = 0) -> SparseMatrix:
    """Rows of ``lengths`` entries (a number, or the bounds of a random one) at random columns."""
    rng = np.random.default_rng(seed)
    low, high = (lengths, lengths) if isinstance(lengths, int) else lengths
    dense = np.zeros((rows, columns))
    for row in dense:
        count = min(int(rng.integers(low, high + 1)), columns)
        row[rng.permutation(columns)[:count]] = rng.standard_normal(count)
    return SparseMatrix.from_dense(dense)


def mesh_like_matrix(rows: int, columns: int) -> SparseMatrix:
    """Three entries per row at columns that neighbouring rows share, as in a step of a mesh hierarchy."""
    weights = np.random.default_rng(0).dirichlet(np.ones(3), rows)
    column = (np.arange(rows)[:, None] * columns // rows + np.array([0, 1, 20])) % columns
    row = np.repeat(np.arange(rows), 3)
    return SparseMatrix.from_scipy(sp.csr_array((weights.ravel(), (row, column.ravel())), shape=(rows, columns)))


def interpreted(backend: str, device: str) -> bool:
    """Whether this is Triton's interpreter, where every program costs a millisecond and cases must be few."""
    return backend == "triton" and device == "cpu"


def random_input(matrix: SparseMatrix, batch: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + channels)
    return torch.randn(batch, matrix.shape[1], channels, generator=generator, dtype=DOUBLE).to(device, dtype)


def check_product(got: Tensor, matrix: SparseMatrix, x: Tensor, transposed: bool = False) -> None:
    """``got`` must be as near to the float64 product as plain PyTorch: twice its error and one rounding."""
    exact, plain = matrix.to_dense(DOUBLE), matrix.to_dense(DOUBLE if x.dtype == DOUBLE else FLOAT)
    if transposed:
        exact, plain = exact.T, plain.T
    oracle = exact @ x.to(DOUBLE)
    error = (got.to(DOUBLE) - oracle).abs()
    plain_error = ((plain @ x.to(plain.dtype)).to(x.dtype).to(DOUBLE) - oracle).abs()
    # The oracle of float64 is float64 itself, so that there the bound is that of a sum in another order.
    rounding = torch.finfo(x.dtype).eps * (4 if x.dtype == DOUBLE else 0.5) * (exact.abs() @ x.to(DOUBLE).abs())
    assert got.dtype == x.dtype and got.shape == oracle.shape and got.is_contiguous()
    allowed = 2 * plain_error.amax() + rounding if oracle.numel() else rounding
    assert bool((error <= allowed).all()), f"error {error.amax():.3g}, plain PyTorch {plain_error.amax():.3g}"


# Matrices with the (batch, channels) they are tried with.
SHAPES = {
    "three-per-row": (random_matrix(41, 17, 3), [(1, 3), (11, 3), (2, 4), (2, 16), (3, 130)]),
    "padded": (random_matrix(50, 20, (4, 5)), [(6, 1), (2, 64)]),
    "uneven": (random_matrix(29, 31, (0, 9)), [(1, 3), (5, 3), (16, 3), (2, 2), (2, 64), (1, 512)]),
    "long": (random_matrix(5, 300, (40, 300)), [(1, 3), (5, 3), (2, 5), (1, 72)]),
    "one-row": (random_matrix(1, 700, 700), [(3, 3)]),
    "one-column": (random_matrix(70, 1, (0, 1)), [(9, 1)]),
}


@on_every_backend
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(backend: str, device: str, dtype: torch.dtype, shape: str) -> None:
    skip_unsupported(backend, device, dtype)
    matrix = SHAPES[shape][0].to(device)
    for batch, channels in SHAPES[shape][1][: 2 if interpreted(backend, device) else None]:
        x = random_input(matrix, batch, channels, dtype, device).requires_grad_()
        out = sparse_upsample(x, matrix, backend=backend)
        check_product(out.detach(), matrix, x.detach())
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        (grad_x,) = torch.autograd.grad(out, x, grad)
        check_product(grad_x, matrix, grad, transposed=True)


@on_every_backend
def test_random_shapes(backend: str, device: str) -> None:
    @settings(max_examples=15 if interpreted(backend, device) else 60, deadline=None)
    @given(
        shape=st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 4), st.integers(0, 9)),
        longest=st.integers(0, 12),
        even=st.booleans(),
        dtype=st.sampled_from([FLOAT, HALF]),
        seed=st.integers(0, 1000),
    )
    def check(shape: tuple[int, int, int, int], longest: int, even: bool, dtype: torch.dtype, seed: int) -> None:
        rows, columns, batch, channels = shape
        matrix = random_matrix(rows, columns, longest if even else (0, longest), seed).to(device)
        x = random_input(matrix, batch, channels, dtype, device).requires_grad_()
        out = sparse_upsample(x, matrix, backend=backend)
        check_product(out.detach(), matrix, x.detach())
        grad = torch.ones_like(out)
        (grad_x,) = torch.autograd.grad(out, x, grad)
        check_product(grad_x, matrix, grad, transposed=True)

    check()


@on_every_backend
def test_published_matrices(backend: str, device: str, shared: Path) -> None:
    path = shared / "data" / "fastmetro" / "mesh_downsampling.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    steps = np.load(path, allow_pickle=True, encoding="latin1")["U"]
    fine, coarse = SparseMatrix.from_scipy(steps[0]), SparseMatrix.from_scipy(steps[1])
    for matrix in (coarse,) if interpreted(backend, device) else (fine, coarse, fine @ coarse):
        matrix = matrix.to(device)
        x = random_input(matrix, 2, 3, FLOAT, device).requires_grad_()
        out = sparse_upsample(x, matrix, backend=backend)
        check_product(out.detach(), matrix, x.detach())
        grad = out.detach()
        (grad_x,) = torch.autograd.grad(out, x, grad)
        check_product(grad_x, matrix, grad, transposed=True)


@on_every_backend
@pytest.mark.parametrize("shape", [(4, 0, 2, 3), (0, 4, 2, 3), (4, 4, 0, 3), (4, 4, 2, 0), (0, 0, 0, 0)])
def test_empty(backend: str, device: str, shape: tuple[int, int, int, int]) -> None:
    rows, columns, batch, channels = shape
    matrix = SparseMatrix(sp.csr_array((rows, columns))).to(device)
    x = torch.ones(batch, columns, channels, device=device, requires_grad=True)
    out = sparse_upsample(x, matrix, backend=backend)
    assert torch.equal(out, torch.zeros(batch, rows, channels, device=device))
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad_x, torch.zeros_like(x))


def strided_inputs(tokens: int, channels: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "shared batch": randn(1, tokens, channels).expand(3, -1, -1),
        "channels outermost": randn(channels, tokens, 3).permute(2, 1, 0),
        "batch innermost": randn(tokens, channels, 3).permute(2, 0, 1),
        "every second token": randn(2, 2 * tokens, channels)[:, ::2],
        "every second channel": randn(2, tokens, 2 * channels)[..., ::2],
        "part of the channels": randn(2, tokens, channels + 3)[..., 2:-1],
        "unaligned start": randn(2 * tokens * channels + 1)[1:].view(2, tokens, channels),
        "one token for all": randn(2, 1, channels).expand(-1, tokens, -1),
        "one channel for all": randn(2, tokens, 1).expand(-1, -1, channels),
    }


@on_every_backend
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", ["three-per-row", "uneven"])
def test_strides(backend: str, device: str, dtype: torch.dtype, shape: str) -> None:
    matrix = SHAPES[shape][0].to(device)
    for channels in (3,) if interpreted(backend, device) else (3, 16):
        for name, x in strided_inputs(matrix.shape[1], channels, device).items():
            x = x.to(dtype, memory_format=torch.preserve_format)
            got = sparse_upsample(x, matrix, backend=backend)
            want = sparse_upsample(x.contiguous(), matrix, backend=backend)
            if backend == "triton":  # another program per stride pattern, in which products may be fused otherwise
                torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, msg=name)
            else:
                assert torch.equal(got, want), name
            check_product(got, matrix, x)


@on_every_backend
def test_offsets_past_2_31_elements(backend: str, device: str) -> None:
    # Almost all of this memory is never touched, and on CPU never becomes real.
    storage = torch.empty(2**31 + 4096, dtype=HALF, device=device)
    matrix = random_matrix(9, 5, 3).to(device)
    by_batch = storage.as_strided((2, 5, 3), (2**31, 3, 1))
    by_token = storage.as_strided((1, 5, 3), (0, 2**29, 1))
    by_channel = storage.as_strided((1, 5, 3), (0, 3, 2**30))
    for x in (by_batch, by_token, by_channel):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        check_product(sparse_upsample(x, matrix, backend=backend), matrix, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an output of 4.6 GB is for a GPU")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("lengths", [3, (0, 5)])
def test_output_past_2_31_elements(backend: str, lengths: int | tuple[int, int]) -> None:
    matrix = random_matrix(70001, 5, lengths).to("cuda")
    x = random_input(matrix, 1, 1, HALF, "cuda").expand(32768, -1, -1)
    out = sparse_upsample(x, matrix, backend=backend)
    assert out.numel() > 2**31
    for index in (0, 32767):
        check_product(out[index : index + 1], matrix, x[:1])


@on_every_backend
def test_nothing_is_left_unwritten(backend: str, device: str) -> None:
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(4, device=device).isnan().all()
        for matrix, sizes in SHAPES.values():
            matrix = matrix.to(device)
            for batch, channels in sizes[:2]:
                x = random_input(matrix, batch, channels, FLOAT, device).requires_grad_()
                out = sparse_upsample(x, matrix, backend=backend)
                assert out.isfinite().all()
                assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(previous)


@on_every_backend
@pytest.mark.parametrize("shape", ["three-per-row", "padded", "uneven", "long"])
def test_nan_reaches_only_the_rows_that_name_it(backend: str, device: str, shape: str) -> None:
    matrix = SHAPES[shape][0].to(device)
    for bad in (float("nan"), float("inf")):
        x = random_input(matrix, 3, 3, FLOAT, device)
        clean = sparse_upsample(x, matrix, backend=backend)
        x[1, 0] = bad
        got = sparse_upsample(x, matrix, backend=backend)
        hit = torch.zeros_like(got, dtype=torch.bool)
        hit[1] = (matrix.to_dense()[:, 0] != 0)[:, None]
        assert torch.equal(~got.isfinite(), hit)
        assert torch.equal(got[~hit], clean[~hit])


@on_every_backend
@pytest.mark.parametrize("shape", ["three-per-row", "uneven", "long"])
def test_same_bits_in_every_run(backend: str, device: str, shape: str) -> None:
    matrix = SHAPES[shape][0].to(device)
    x = random_input(matrix, 5, 3, FLOAT, device).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = sparse_upsample(x, matrix, backend=backend)
        return out.detach(), torch.autograd.grad(out.sin().sum(), x)[0]

    first = run()
    for _ in range(1 if interpreted(backend, device) else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@on_every_backend
def test_same_bits_with_any_number_of_threads(backend: str, device: str) -> None:
    if device == "cuda" or backend == "triton":
        pytest.skip("about the CPU's threads")
    matrix = random_matrix(3001, 500, 3)
    x = random_input(matrix, 3, 3, FLOAT, device)
    outputs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs.append(sparse_upsample(x, matrix, backend=backend))
    check_product(outputs[0], matrix, x)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def check_conversions() -> None:
    """The CPU kernels convert every float16, and round to float16 and bfloat16, as PyTorch does."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(HALF).view(1, -1, 1)
    for scale in (1.0, 1 / 3, 3.0, 1e-5):
        matrix = SparseMatrix(scale * sp.eye_array(halves.numel(), format="csr"))
        for x in (halves, halves.expand(8, -1, 3), halves.expand(-1, -1, 9), halves.to(BFLOAT).expand(2, -1, 3)):
            expected = (x.float() * float(np.float32(scale))).to(x.dtype)
            got = sparse_upsample(x, matrix, backend="native")
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


needs_cpu_kernels = pytest.mark.skipif(
    bool(backends.native_cpu_reasons()), reason="; ".join(backends.native_cpu_reasons())
)


@needs_cpu_kernels
def test_conversions_of_half_precision() -> None:
    check_conversions()


@needs_cpu_kernels
def test_conversions_without_vector_instructions() -> None:
    code = "import test_upsampling; test_upsampling.check_conversions()"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "FASTMETRO_SIMD": "baseline", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.ones(2, 5, 3, dtype=torch.int32)}, TypeError, "x: expected float32.*got torch.int32"),
        ({"x": torch.ones(2, 5, 3).to_sparse()}, TypeError, "x: expected a dense tensor, got layout torch.sparse_coo"),
        ({"x": torch.ones(5, 3)}, ValueError, r"x: expected shape \[B, 5, C\].*\(9, 5\), got \(5, 3\)"),
        ({"x": torch.ones(2, 9, 3)}, ValueError, r"x: expected shape \[B, 5, C\].*got \(2, 9, 3\)"),
        ({"x": torch.ones(2, 5, 3, device="meta")}, ValueError, "matrix: expected on meta like x, but it is on cpu"),
        ({"matrix": sp.eye_array(5)}, TypeError, "matrix: expected a SparseMatrix, got dia_array.*from_scipy"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is not known; accepted: 'auto', 'reference'"),
        ({"backend": "triton", "x": torch.ones(2, 5, 3, dtype=DOUBLE)}, BackendUnavailable, "triton: .*float64"),
        ({"backend": "triton", "x": torch.ones(2, 5, 3, dtype=BFLOAT)}, BackendUnavailable, "triton: .*bfloat16"),
    ],
)
def test_wrong_input_is_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparse_upsample(**{"x": torch.ones(2, 5, 3), "matrix": random_matrix(9, 5, 3), **arguments})


def test_values_that_require_grad_are_refused() -> None:
    matrix = random_matrix(9, 5, 3)
    matrix.values.requires_grad_()
    with pytest.raises(ValueError, match="constants"):
        sparse_upsample(torch.ones(1, 5, 3), matrix)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
def test_auto_takes_the_kernels(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels where they are built (float64: on CPU), else Triton on a GPU, and never interpreted Triton."""
    called = []
    for name, product in api._PRODUCTS.items():
        monkeypatch.setitem(api._PRODUCTS, name, lambda *args, n=name, p=product: called.append(n) or p(*args))
    matrix = random_matrix(9, 5, 3).to(device)
    sparse_upsample(torch.ones(2, 5, 3, dtype=dtype, device=device), matrix)
    double_on_gpu = dtype == DOUBLE and device.type == "cuda"
    fallback = "triton" if device.type == "cuda" and not double_on_gpu else "reference"
    native = not backends.native_reasons("upsample_native", device) and not double_on_gpu
    assert called == ["native" if native else fallback]


def test_a_missing_backend_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native_reasons", lambda operator, device: ["it is not built"])
    with pytest.raises(BackendUnavailable, match="native: it is not built"):
        sparse_upsample(torch.ones(2, 5, 3), random_matrix(9, 5, 3), backend="native")
    out = sparse_upsample(torch.ones(2, 5, 3), random_matrix(9, 5, 3))  # auto takes the next one
    check_product(out, random_matrix(9, 5, 3), torch.ones(2, 5, 3))
