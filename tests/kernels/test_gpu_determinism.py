"""On a GPU: the same bits in a hundred runs, in CUDA graphs and beside other work; offsets past 2^31 elements.

Small sizes and other layouts past 2^31 are in `test_attention.py` and `test_upsampling.py`; here all tensors are large.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import RUNNERS, Runner, grid_faces
from test_upsampling import check_product, random_matrix, targets
from torch import Tensor

from fastmetro_kernels import SparseMatrix, TokenTopology, sparse_upsample, topology_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
HALF = torch.float16
LARGE = 2**31
Run = Callable[[], list[Tensor]]

attention_backends = pytest.mark.parametrize(
    "runner", [r for r in RUNNERS if r.device == DEVICE and r.dtype == HALF], ids=str
)
kernels_of_attention = pytest.mark.parametrize(
    "runner", [r for r in RUNNERS if r.device == DEVICE and r.dtype == HALF and r.backend != "reference"], ids=str
)
upsampling_backends = pytest.mark.parametrize(
    ("backend", "device"), [target for target in targets() if target.values[1] == DEVICE]
)
dims = pytest.mark.parametrize("dim", [16, 64])


def attention_run(runner: Runner, dim: int, batch: int = 4, dropout_p: float = 0.2, numbers: int = 0) -> Run:
    """Forward and backward on a mesh of 420 vertices with 14 hubs; the same inputs in every run."""
    topology = TokenTopology.from_faces(grid_faces(20, 21), num_hubs=14, order="locality").to(DEVICE)
    generator = torch.Generator().manual_seed(numbers)
    shape = (batch, topology.num_tokens, 8, dim)
    *leaves, grad = (torch.randn(shape, generator=generator).to(DEVICE, HALF) for _ in range(4))
    leaves = [x.requires_grad_() for x in leaves]
    grad_lse = torch.randn(batch, 8, topology.num_tokens, generator=generator).to(DEVICE)
    seed = torch.tensor([5 + numbers], device=DEVICE)

    def run() -> list[Tensor]:
        options = {"dropout_p": dropout_p, "seed": seed, "return_lse": True, "backend": runner.backend}
        out, lse = topology_attention(*leaves, topology, **options)
        return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [grad, grad_lse])]

    return run


def upsampling_run(backend: str, shape: str, batch: int = 33, numbers: int = 0) -> Run:
    """Product and gradient with a matrix of even, uneven or long rows."""
    lengths: dict[str, int | tuple[int, int]] = {"even": 3, "uneven": (0, 9), "long": (40, 300)}
    rows, columns = (7, 300) if shape == "long" else (1723, 431)
    matrix = random_matrix(rows, columns, lengths[shape]).to(DEVICE)
    generator = torch.Generator().manual_seed(numbers)
    x = torch.randn(batch, columns, 3, generator=generator).to(DEVICE).requires_grad_()
    grad = torch.randn(batch, rows, 3, generator=generator).to(DEVICE)

    def run() -> list[Tensor]:
        out = sparse_upsample(x, matrix, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, x, grad)]

    return run


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(b).all(), f"result {index} is not finite"
        assert torch.equal(a, b), f"result {index} differs by up to {(a.double() - b.double()).abs().max():.3g}"


# ---- a hundred runs -------------------------------------------------------------------------------------------


def check_hundred_runs(run: Run) -> None:
    """In every second run another stream keeps multiprocessors busy, so that blocks start in another order."""
    want = run()
    busy, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE, dtype=HALF)
    torch.cuda.synchronize()
    for step in range(100):
        if step % 2:
            with torch.cuda.stream(busy):
                _ = noise @ noise
        assert_same_bits(run(), want)


@dims
@attention_backends
def test_attention_has_the_same_bits_a_hundred_times(runner: Runner, dim: int) -> None:
    check_hundred_runs(attention_run(runner, dim))


@dims
@kernels_of_attention
def test_attention_of_one_sample_has_the_same_bits_a_hundred_times(runner: Runner, dim: int) -> None:
    """Few heads: hub rows are split, and their parts added up."""
    check_hundred_runs(attention_run(runner, dim, batch=1, dropout_p=0.0))


@pytest.mark.parametrize("shape", ["even", "uneven", "long"])
@upsampling_backends
def test_upsampling_has_the_same_bits_a_hundred_times(backend: str, device: str, shape: str) -> None:
    check_hundred_runs(upsampling_run(backend, shape))


# ---- CUDA graphs and streams ----------------------------------------------------------------------------------


def check_graph(run: Run) -> None:
    """A captured call gives the bits of a plain one, also when its memory held something else before."""
    want = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(10):
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        assert_same_bits(captured, want)


@dims
@attention_backends
def test_attention_in_a_graph(runner: Runner, dim: int) -> None:
    check_graph(attention_run(runner, dim))


@pytest.mark.parametrize("shape", ["even", "uneven", "long"])
@upsampling_backends
def test_upsampling_in_a_graph(backend: str, device: str, shape: str) -> None:
    check_graph(upsampling_run(backend, shape))


def check_streams(runs: list[Run]) -> None:
    """Calls on streams of their own, all at once, give what they give one after the other."""
    want = [run() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    for _ in range(10):
        found: list[list[list[Tensor]]] = [[] for _ in runs]
        for _ in range(5):  # enough work in flight that the streams overlap
            for stream, run, results in zip(streams, runs, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(run())
        torch.cuda.synchronize()
        for results, expected in zip(found, want, strict=True):
            for result in results:
                assert_same_bits(result, expected)


@dims
@attention_backends
def test_attention_on_two_streams(runner: Runner, dim: int) -> None:
    check_streams([attention_run(runner, dim, numbers=n) for n in (0, 1)])


@upsampling_backends
def test_upsampling_on_two_streams(backend: str, device: str) -> None:
    check_streams([upsampling_run(backend, shape, numbers=n) for n, shape in enumerate(("even", "long"))])


def test_ops_on_two_streams() -> None:
    """Both ops of one network at once, with the backends that are chosen for them."""
    check_streams([attention_run(Runner(DEVICE, "auto", HALF), 64), upsampling_run("auto", "even")])


# ---- large ----------------------------------------------------------------------------------------------------


def need_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, there are {free:.0f}")


def check_large_attention(runner: Runner, batch: int, heads: int) -> None:
    """The first and last batch elements and heads of a large call against calls with one of each."""
    topology = TokenTopology.from_faces(grid_faces(30, 31), num_hubs=14, order="locality").to(DEVICE)
    shape = (batch, topology.num_tokens, heads, 64)
    generator = torch.Generator(DEVICE).manual_seed(1)
    *inputs, grad = (torch.randn(shape, generator=generator, device=DEVICE, dtype=HALF) for _ in range(4))
    assert grad.numel() > LARGE
    leaves = [x.requires_grad_() for x in inputs]
    options = {"return_lse": True, "backend": runner.backend}
    out, lse = topology_attention(*leaves, topology, **options)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for element in (0, batch - 1):
        for head in (0, heads - 1):
            piece = (slice(element, element + 1), slice(None), slice(head, head + 1))
            one = [x[piece].detach().clone().requires_grad_() for x in leaves]
            out_one, lse_one = topology_attention(*one, topology, **options)
            want = [out_one, *torch.autograd.grad(out_one, one, grad[piece])]
            # A single head may be cut into other parts, whose sums are rounded otherwise.
            for got, expected in zip(found, want, strict=True):
                torch.testing.assert_close(got[piece], expected, rtol=4e-3, atol=4e-3)
            torch.testing.assert_close(lse[element, head], lse_one[0, 0], rtol=1e-5, atol=1e-5)


@kernels_of_attention
@pytest.mark.parametrize("long_axis", ["batch", "heads"])
def test_attention_past_2_31_elements(runner: Runner, long_axis: str) -> None:
    """The last batch element, or the last tokens of the only one, lie past 2^31 in inputs, outputs and gradients."""
    need_memory(44)
    count = LARGE // (30 * 31 * 64)
    check_large_attention(runner, *((count // 8, 8) if long_axis == "batch" else (1, count)))


@kernels_of_attention
def test_log_sum_exp_past_2_31_elements(runner: Runner) -> None:
    need_memory(60)
    topology = TokenTopology.from_faces(grid_faces(41, 42), num_hubs=14, order="locality").to(DEVICE)
    tokens, heads = topology.num_tokens, 64
    batch = LARGE // (tokens * heads) + 2
    single = [torch.randn(1, tokens, heads, 8, device=DEVICE, dtype=HALF) for _ in range(3)]
    shared = [x.expand(batch, -1, -1, -1) for x in single]
    out, lse = topology_attention(*shared, topology, return_lse=True, backend=runner.backend)
    assert lse.numel() > LARGE
    want, want_lse = topology_attention(*single, topology, return_lse=True, backend=runner.backend)
    for index in (0, batch - 1):
        torch.testing.assert_close(out[index], want[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[index], want_lse[0], rtol=1e-5, atol=1e-5)


def large_gradient(matrix: SparseMatrix, batch: int, backend: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(2)
    x = torch.zeros(batch, matrix.shape[1], 1, device=DEVICE, dtype=HALF, requires_grad=True)
    grad = torch.randn(batch, matrix.shape[0], 1, generator=generator, device=DEVICE, dtype=HALF)
    assert grad.numel() > LARGE
    (found,) = torch.autograd.grad(sparse_upsample(x, matrix, backend=backend), x, grad)
    for index in (0, batch // 2, batch - 1):
        check_product(found[index : index + 1], matrix, grad[index : index + 1], transposed=True)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("lengths", [3, (0, 5)], ids=str)
def test_upsampling_gradient_past_2_31_elements(backend: str, lengths: int | tuple[int, int]) -> None:
    need_memory(16)
    # Few long rows in the transpose, and as many rows as columns: gathered, staged and split work.
    large_gradient(random_matrix(70001, 5, lengths).to(DEVICE), LARGE // 70001 + 2, backend)
    large_gradient(random_matrix(4001, 4001, lengths).to(DEVICE), LARGE // 4001 + 2, backend)
