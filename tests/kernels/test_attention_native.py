"""What is particular to the C++ attention kernels: instruction sets, threads, storage types, groups of batches, guards.

That they compute the right thing is tested with every other backend in test_attention.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmetro_kernels import BackendUnavailable, TokenTopology, backends, topology_attention

MISSING = backends.native_reasons("attention_forward_native", torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("baseline", "avx2", "avx512")  # a level beyond the processor's runs its best one
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def grid(rows: int, columns: int, num_hubs: int) -> TokenTopology:
    """A triangulated grid: 7 neighbours inside, itself included."""
    index = torch.arange(rows * columns).view(rows, columns)
    a, b, c, d = (t.flatten() for t in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([b, d, c], 1)])
    return TokenTopology.from_faces(faces, num_vertices=rows * columns, num_hubs=num_hubs)


def random_graph(vertices: int, num_hubs: int, density: float) -> TokenTopology:
    """Any directed graph, isolated vertices included."""
    pattern = torch.rand(vertices, vertices, generator=torch.Generator().manual_seed(1)) < density
    return TokenTopology.from_adjacency(pattern, num_hubs=num_hubs, symmetric=False)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, count: int = 4) -> list[Tensor]:
    """Normal random tensors from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def results(
    qkv: list[Tensor], grad: Tensor, topology: TokenTopology, backend: str, dropout_p: float = 0.0
) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in qkv]
    q, k, v = inputs
    seed = 11 if dropout_p else None
    out, lse = topology_attention(
        q, k, v, topology, dropout_p=dropout_p, seed=seed, return_lse=True, backend=backend
    )  # fmt: skip
    grads = torch.autograd.grad(out, inputs, grad)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def assert_as_good_as_pytorch(qkv: list[Tensor], grad: Tensor, found: dict[str, Tensor], **options: object) -> None:
    """No more than twice as far from float64 as plain PyTorch at the same precision, and a few roundings."""
    plain = results(qkv, grad, backend="reference", **options)  # type: ignore[arg-type]
    exact = results([t.double() for t in qkv], grad.double(), backend="reference", **options)  # type: ignore[arg-type]
    for name, truth in exact.items():
        finite = truth.isfinite()
        assert torch.equal(finite, found[name].isfinite()), name
        if not finite.any():
            continue
        error = (found[name].double() - truth)[finite].abs().max()
        allowed = 2 * (plain[name].double() - truth)[finite].abs().max()
        roundings = 16 if truth.dtype == found[name].dtype else 2  # the float64 reference rounds too
        floor = roundings * torch.finfo(found[name].dtype).eps * truth[finite].abs().max()
        assert error <= allowed + floor, f"{name}: {error:.2e} > 2 * {allowed / 2:.2e} + {floor:.2e}"


LEVEL_CASES = [(dtype, 33) for dtype in DTYPES] + [(torch.float32, 1), (torch.float32, 64), (torch.float64, 16)]


def save_level_cases(path: str) -> None:
    """Runs in another process, whose environment caps the instruction set."""
    found = []
    for dtype, dim in LEVEL_CASES:
        topology = random_graph(150, 17, 0.05)
        *qkv, grad = tensors((2, topology.num_tokens, 3, dim), dtype)
        found.append([results(qkv, grad, topology, "native", p) for p in (0.0, 0.3)])
    torch.save(found, path)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_is_right(level: str, tmp_path: Path) -> None:
    path = tmp_path / "results.pt"
    code = f"from test_attention_native import save_level_cases; save_level_cases({str(path)!r})"
    search = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"FASTMETRO_SIMD": level, "PYTHONPATH": search}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    found = torch.load(path, weights_only=True)
    topology = random_graph(150, 17, 0.05)
    for (dtype, dim), pair in zip(LEVEL_CASES, found, strict=True):
        *qkv, grad = tensors((2, topology.num_tokens, 3, dim), dtype)
        for dropout_p, result in zip((0.0, 0.3), pair, strict=True):
            assert_as_good_as_pytorch(qkv, grad, result, topology=topology, dropout_p=dropout_p)


def test_number_of_threads_changes_no_bit() -> None:
    topology = grid(20, 21, 14)
    *qkv, grad = tensors((2, topology.num_tokens, 3, 64), torch.float32)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        found.append(results(qkv, grad, topology, "native", 0.2))
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_full_size_mesh(dtype: torch.dtype) -> None:
    topology = grid(70, 98, 14)
    *qkv, grad = tensors((1, topology.num_tokens, 2, 64), dtype)
    assert_as_good_as_pytorch(qkv, grad, results(qkv, grad, topology, "native"), topology=topology, dropout_p=0.0)


@pytest.mark.parametrize("shared_batch", (False, True))
def test_batches_beyond_one_group(shared_batch: bool) -> None:
    """More than 2^21 elements are worked on in groups of batches; dropout counts the batches of the whole call."""
    topology = random_graph(100, 3, 0.05)
    *qkv, grad = tensors((12, topology.num_tokens, 8, 250), torch.float32)
    if shared_batch:
        qkv = [tensor[:1].expand_as(tensor) for tensor in qkv]
    found = results(qkv, grad, topology, "native", 0.1)
    assert_as_good_as_pytorch(qkv, grad, found, topology=topology, dropout_p=0.1)


@pytest.mark.parametrize("hubs", (0, 2, 16, 64))
@pytest.mark.parametrize("density", (0.0, 0.01, 1.0))
def test_lists_of_every_length(hubs: int, density: float) -> None:
    topology = random_graph(70, hubs, density)
    *qkv, grad = tensors((1, topology.num_tokens, 2, 24), torch.float32)
    for dropout_p in (0.0, 0.5):
        found = results(qkv, grad, topology, "native", dropout_p)
        assert_as_good_as_pytorch(qkv, grad, found, topology=topology, dropout_p=dropout_p)


def test_rows_with_a_single_key() -> None:
    """Their weight is 1 whatever the score, so the exact dq is 0; what is left is the rounding of dO . v - delta."""
    topology = random_graph(70, 1, 0.0)
    *qkv, grad = tensors((1, topology.num_tokens, 2, 24), torch.float32)
    found = results(qkv, grad, topology, "native")
    assert torch.equal(found["out"][:, 1:], qkv[2][:, :1].expand_as(found["out"][:, 1:]))
    norms = [tensor.norm(dim=-1).max() for tensor in (grad, qkv[2], qkv[1])]
    assert found["dq"][:, 1:].abs().max() <= torch.finfo(torch.float32).eps * torch.stack(norms).prod()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(dtype: torch.dtype) -> None:
    """Deterministic mode fills fresh memory with NaN."""
    topology = random_graph(140, 5, 0.02)
    *qkv, grad = tensors((2, topology.num_tokens, 2, 20), dtype)
    torch.use_deterministic_algorithms(True)
    try:
        found = results(qkv, grad, topology, "native")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("scale", (-0.7, 0.0, 300.0))
def test_scales_and_large_scores(scale: float) -> None:
    topology = random_graph(140, 14, 0.05)
    q, k, v, _ = tensors((1, topology.num_tokens, 2, 16), torch.float32)
    out, lse = topology_attention(q, k, v, topology, scale=scale, return_lse=True, backend="native")
    exact, exact_lse = topology_attention(
        q.double(), k.double(), v.double(), topology, scale=scale, return_lse=True, backend="reference"
    )
    magnitude = max(1.0, exact_lse.abs().max().item())
    assert (lse - exact_lse).abs().max() <= 4 * torch.finfo(torch.float32).eps * magnitude
    assert (out - exact).abs().max() <= 32 * torch.finfo(torch.float32).eps * magnitude


def test_nan_stays_where_it_can_be_seen() -> None:
    topology = grid(12, 12, 4)
    q, k, v, _ = tensors((1, topology.num_tokens, 1, 16), torch.float32)
    vertex = 4 + 70
    q[0, vertex] = torch.nan
    out = topology_attention(q, k, v, topology, backend="native")
    assert out[0, vertex].isnan().all()
    assert out[0, :vertex].isfinite().all() and out[0, vertex + 1 :].isfinite().all()


def test_too_wide_heads_are_refused_with_the_limit() -> None:
    topology = grid(3, 3, 1)
    q = torch.zeros(1, topology.num_tokens, 1, 257)
    with pytest.raises(BackendUnavailable, match="256"):
        topology_attention(q, q, q, topology, backend="native")


@pytest.mark.parametrize(
    "change",
    (
        {"columns": torch.tensor([0, 9], dtype=torch.int32)},
        {"columns": torch.tensor([0, -1], dtype=torch.int32)},
        {"columns": torch.tensor([0], dtype=torch.int32)},
        {"row_offsets": torch.tensor([0, 3, 2], dtype=torch.int32)},
        {"row_offsets": torch.tensor([0, 2], dtype=torch.int32)},
        {"row_offsets": torch.tensor([0, 1, 2])},
        {"num_hubs": 65},
        {"num_hubs": -1},
        {"dropout_p": 0.5},
        {"dropout_p": 1.0},
        {"k": torch.zeros(1, 3, 2, 8)},
        {"v": torch.zeros(1, 3, 1, 8, dtype=torch.float64)},
        {"q": torch.zeros(3, 1, 8)},
    ),
    ids=lambda change: "-".join(change),
)
def test_direct_calls_cannot_reach_beyond_memory(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 3, 1, 8) for name in ("q", "k", "v")}
    lists = {"row_offsets": torch.tensor([0, 1, 2], dtype=torch.int32), "columns": torch.tensor([0, 1]).int()}
    arguments |= lists | {"num_hubs": 1, "scale": 1.0, "dropout_p": 0.0, "seed": None}
    torch.ops.fastmetro_kernels.attention_forward_native(**arguments)
    with pytest.raises(RuntimeError, match="topology_attention"):
        torch.ops.fastmetro_kernels.attention_forward_native(**(arguments | change))
