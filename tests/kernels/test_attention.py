"""Numbers of topology-masked attention: every backend, device and dtype against float64 dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    FLOAT32_RUNNERS,
    KERNEL_RUNNERS,
    RUNNERS,
    Graph,
    Runner,
    assert_within_budget,
    graphs,
    grid_faces,
    keep_mask,
    measured,
    oracle,
    oracle_forward,
    plain,
    random_inputs,
    random_mask,
    topology_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmetro_kernels.attention import topology_attention
from fastmetro_kernels.topology import TokenTopology

every_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
float32_runner = pytest.mark.parametrize("runner", FLOAT32_RUNNERS, ids=str)
kernel_runner = pytest.mark.parametrize("runner", KERNEL_RUNNERS, ids=str)


def attend(runner: Runner, inputs: list[Tensor], topology: TokenTopology, **options: object) -> tuple[Tensor, Tensor]:
    """(out, lse) on the backend of the runner."""
    return topology_attention(*inputs, topology, return_lse=True, backend=runner.backend, **options)


def cotangents(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse."""
    batch, tokens, heads, _ = inputs[0].shape
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).to(inputs[0])
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    grad_lse = torch.randn(batch, heads, tokens, generator=generator, dtype=torch.float64)
    return grad_out, grad_lse.to(inputs[0].device, wide)


def check(
    runner: Runner,
    graph: Graph,
    inputs: list[Tensor],
    order: str = "natural",
    slack: float = 0.0,
    scale: float | None = None,
) -> None:
    """Holds outputs and gradients against the budget, widened by `slack`."""
    gradients = cotangents(inputs)
    out, lse = attend(runner, inputs, topology_of(graph, runner.device, order), scale=scale)
    assert out.dtype == runner.dtype and out.is_contiguous()
    assert lse.dtype == torch.promote_types(runner.dtype, torch.float32)
    result = measured(out, lse, inputs, *gradients)
    baseline = plain(inputs, graph.mask, *gradients, scale=scale)
    assert_within_budget(result, oracle(inputs, graph.mask, *gradients, scale=scale), baseline, slack)


@pytest.mark.parametrize("name", graphs())
@every_runner
def test_output_and_gradients(runner: Runner, name: str) -> None:
    graph = graphs()[name]
    check(runner, graph, random_inputs(runner, 1 if runner.interpreted else 2, len(graph.mask), 2, graph.head_dim))


@pytest.mark.parametrize("dim", [8, 9, 12, 20, 48, 64, 96, 100, 128])
@every_runner
def test_head_dims(runner: Runner, dim: int) -> None:
    if runner.interpreted and runner.dtype != torch.float32:
        pytest.skip("the interpreter is slow; head dims are covered in float32")
    graph = Graph(random_mask(20, 3, 0.2, True, True, 5), 3, dim)
    check(runner, graph, random_inputs(runner, 1, 23, 2, dim))


@float32_runner
def test_large_scores(runner: Runner) -> None:
    """Scores of several hundreds: exp of them would overflow without subtracting the maximum.

    The interpreter multiplies with NumPy, which on some processors rounds k q^T in another way than q k^T. Weights that
    the column pass recomputes then differ by the rounding of the scores, which is large here; kernels on a GPU add up
    both in the same order.
    """
    graph = graphs()["mesh"]
    q, k, v = (x.detach() for x in random_inputs(runner, 1, len(graph.mask), 2, 16))
    q, k = 40 * q, 40 * k
    largest = float(torch.einsum("bihd,bjhd->bhij", q, k).abs().max()) / 4
    slack = torch.finfo(torch.float32).eps * largest if runner.interpreted else 0.0
    check(runner, graph, [x.requires_grad_() for x in (q, k, v)], slack=slack)


@every_runner
def test_processing_order_changes_nothing_visible(runner: Runner) -> None:
    graph = graphs()["mesh"]
    check(runner, graph, random_inputs(runner, 1, len(graph.mask), 2, 16), order="locality")


def _mesh_sizes() -> list[tuple[Runner, int]]:
    """The levels of a body mesh: small ones everywhere; 6,890 vertices on a GPU, for the C++ kernels see their file."""
    wide = (torch.float32, torch.bfloat16)
    sizes = [(r, 431) for r in RUNNERS if not r.interpreted]
    sizes += [(r, 1723) for r in RUNNERS if not r.interpreted and r.dtype in wide]
    return sizes + [(r, 6890) for r in RUNNERS if r.device == "cuda" and r.dtype in wide]


@pytest.mark.parametrize(("runner", "count"), _mesh_sizes(), ids=str)
def test_mesh_sizes(runner: Runner, count: int) -> None:
    faces = grid_faces(*{431: (16, 27), 1723: (35, 50), 6890: (70, 99)}[count])
    mask = TokenTopology.from_faces(faces[(faces < count).all(1)], count, num_hubs=14).mask()
    check(runner, Graph(mask, 14, 16), random_inputs(runner, 1, count + 14, 2, 16), order="locality")


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-60])
@pytest.mark.parametrize("name", ["asymmetric", "isolated_without_hubs"])
@every_runner
def test_explicit_scale(runner: Runner, name: str, scale: float) -> None:
    """Negative; and 0, or so small that it is 0 in float32: all allowed keys count the same, masked ones nothing."""
    graph = graphs()[name]
    check(runner, graph, random_inputs(runner, 1, len(graph.mask), 2, 16), scale=scale)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("runner", [r for r in FLOAT32_RUNNERS if not r.interpreted], ids=str)
def test_random_graphs(runner: Runner, data: st.DataObject) -> None:
    _check_random_graph(runner, data.draw, vertices=70, dims=128, heads=3, batches=3)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("runner", [r for r in FLOAT32_RUNNERS if r.interpreted], ids=str)
def test_random_graphs_in_the_interpreter(runner: Runner, data: st.DataObject) -> None:
    _check_random_graph(runner, data.draw, vertices=12, dims=24, heads=1, batches=1)


def _check_random_graph(
    runner: Runner, draw: Callable[..., Any], vertices: int, dims: int, heads: int, batches: int
) -> None:
    """Any mask within the bounds, any number of hubs, on all shapes up to the given ones."""
    hubs = draw(st.sampled_from([0, 1, 2, 14, 16, 21, 64]))
    count = draw(st.integers(1 if hubs == 0 else 0, vertices))
    density = draw(st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]))
    symmetric, loops = draw(st.booleans()), draw(st.booleans())
    mask = random_mask(count, hubs, density, symmetric, loops, draw(st.integers(0, 2**31)))
    order = draw(st.sampled_from(["natural", "locality"]))
    dim, head_count, batch = (draw(st.integers(low, high)) for low, high in ((8, dims), (1, heads), (1, batches)))
    check(runner, Graph(mask, hubs, dim), random_inputs(runner, batch, hubs + count, head_count, dim), order)


# ---- dropout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345, -1, -(2**63)])
@every_runner
def test_dropout_agrees_with_the_published_rule(runner: Runner, seed: int) -> None:
    if runner.interpreted and seed not in (1, -1):
        pytest.skip("the interpreter is slow; two seeds suffice")
    graph, p = graphs()["mesh"], 0.3
    inputs = random_inputs(runner, 1 if runner.interpreted else 3, len(graph.mask), 2, 16)
    gradients = cotangents(inputs)
    out, lse = attend(runner, inputs, topology_of(graph, runner.device), dropout_p=p, seed=seed)
    keep = keep_mask(seed, inputs[0].shape[0], 2, len(graph.mask), p)
    exact = oracle(inputs, graph.mask, *gradients, keep, p)
    wide = torch.promote_types(runner.dtype, torch.float32)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    dense, dense_lse, _ = oracle_forward(
        *leaves, graph.mask.to(runner.device), 0.25, keep.to(runner.device), p
    )  # plain PyTorch at the same precision, given the mask
    baseline = measured(dense, dense_lse.to(wide), leaves, *gradients)
    assert_within_budget(measured(out, lse, inputs, *gradients), exact, baseline)


@float32_runner
def test_dropout_seeds(runner: Runner) -> None:
    graph = graphs()["hubs_only" if runner.interpreted else "mesh"]
    inputs = random_inputs(runner, 1, len(graph.mask), 2, 16)
    topology = topology_of(graph, runner.device)

    def run(seed: int | Tensor | None, p: float = 0.5) -> Tensor:
        return attend(runner, inputs, topology, dropout_p=p, seed=seed)[0].detach()

    tensor = torch.tensor([123], device=runner.device)
    assert torch.equal(run(123), run(123)), "the same seed gives the same mask"
    assert torch.equal(run(123), run(tensor)) and torch.equal(run(123), run(tensor[0])), "as does a tensor"
    assert not torch.equal(run(123), run(124))
    assert not torch.equal(run(123), run(123 + 2**32)), "the upper half of the seed counts"
    torch.manual_seed(5)
    first, second = run(None), run(None)
    assert not torch.equal(first, second), "without a seed every call draws one"
    torch.manual_seed(5)
    assert torch.equal(first, run(None)), "from PyTorch's generator"
    state = torch.get_rng_state()
    assert torch.equal(run(None, 0.0), run(1, 0.0)), "nothing is dropped at 0, whatever the seed"
    assert torch.equal(state, torch.get_rng_state()), "and nothing is drawn"


@float32_runner
def test_dropout_is_unbiased(runner: Runner) -> None:
    """Constant values make the output the sum of the kept weights over 1 - p: its mean is 1, its spread known."""
    tokens, p = (24, 0.25) if runner.interpreted else (64, 0.25)
    topology = TokenTopology.from_mask(torch.ones(tokens, tokens, dtype=torch.bool), num_hubs=5).to(runner.device)
    batch = 1 if runner.interpreted else 8
    zero = torch.zeros(batch, tokens, 2, 8, device=runner.device)
    out = attend(runner, [zero, zero, torch.ones_like(zero)], topology, dropout_p=p, seed=11)[0][..., 0]
    draws = batch * tokens * tokens * 2
    assert abs(float(out.mean()) - 1.0) < 5 * math.sqrt(p / (1 - p) / draws)
    spread = math.sqrt(p / (1 - p) / tokens)
    assert abs(float(out.std()) / spread - 1.0) < 6 / math.sqrt(2 * out.numel())


def test_dropout_mask_has_no_structure() -> None:
    """Rates per batch and head, query and key stay within 5 standard deviations; neighbours are uncorrelated."""
    p, shape = 0.1, (4, 8, 100, 100)
    keep = keep_mask(3, *shape[:3], p).double()
    for axes in ((2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 2, 3)):
        count = math.prod(shape[axis] for axis in axes)
        worst = (keep.mean(axes) - (1 - p)).abs().max()
        assert worst < 5 * math.sqrt(p * (1 - p) / count), f"rate over axes {axes}"
    centred = keep - (1 - p)
    for axis in range(4):
        left, right = centred.narrow(axis, 0, shape[axis] - 1), centred.narrow(axis, 1, shape[axis] - 1)
        correlation = (left * right).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(left.numel()), f"neighbours along axis {axis}"
    assert abs((centred * centred.transpose(2, 3)).mean() / (p * (1 - p)) - 0.01) < 5 / math.sqrt(keep.numel() / 2)


# ---- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["mesh", "asymmetric", "isolated_without_hubs", "hubs_only"])
@float32_runner
def test_weights(runner: Runner, name: str, dropout_p: float) -> None:
    graph = graphs()[name]
    inputs = random_inputs(runner, 1 if runner.interpreted else 2, len(graph.mask), 2, 16)
    options = {"dropout_p": dropout_p, "seed": 9, "return_weights": True, "backend": runner.backend}
    out, weights = topology_attention(*inputs, topology_of(graph, runner.device), **options)
    dense = weights.to_dense()
    leaves = [x.detach().cpu().double().requires_grad_() for x in inputs]
    keep = keep_mask(9, inputs[0].shape[0], 2, len(graph.mask), dropout_p)
    want_out, _, want = oracle_forward(*leaves, graph.mask, 0.25, keep, dropout_p)
    torch.testing.assert_close(dense.cpu().double(), want, rtol=1e-5, atol=1e-6)
    assert weights.vertex_neighbors.shape[2] == weights.topology.nnz
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    loss = (dense * cotangent.to(dense)).sum() + out.sum()
    want_loss = (want * cotangent).sum() + want_out.sum()
    for got, exact in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want_loss, leaves), strict=True):
        torch.testing.assert_close(got.cpu().double(), torch.nan_to_num(exact), rtol=1e-4, atol=1e-5)


@every_runner
def test_weights_have_the_dtype_of_the_inputs(runner: Runner) -> None:
    graph = graphs()["one_vertex"]
    inputs = random_inputs(runner, 1, 1, 1, 16)
    _, weights = topology_attention(
        *inputs, topology_of(graph, runner.device), return_weights=True, backend=runner.backend
    )
    assert weights.to_dense().dtype == weights.hub_rows.dtype == runner.dtype


# ---- memory and layout ----------------------------------------------------------------------------------------


@float32_runner
def test_every_output_is_written(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory that is allocated during the calls starts as NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.isnan(torch.empty(3)).all(), "poisoning works"
        names = ["isolated_with_hubs", "isolated_without_hubs", "nothing_allowed", "mesh", "64_hubs"]
        for name in names[:3] if runner.interpreted else names:
            graph = graphs()[name]
            inputs = random_inputs(runner, 1, len(graph.mask), 1, 16)
            out, lse = attend(runner, inputs, topology_of(graph, runner.device), dropout_p=0.2, seed=4)
            for tensor in (out, *torch.autograd.grad(out.sum(), inputs)):
                assert torch.isfinite(tensor).all(), name
            assert not torch.isnan(lse).any(), name
    finally:
        torch.use_deterministic_algorithms(False)


@every_runner
def test_repeated_calls_are_bit_identical(runner: Runner) -> None:
    graph = graphs()["17_hubs"]
    inputs = random_inputs(runner, 1 if runner.interpreted else 4, len(graph.mask), 2, 16)
    topology = topology_of(graph, runner.device)

    def run() -> tuple[Tensor, ...]:
        out, lse = attend(runner, inputs, topology, dropout_p=0.1, seed=3)
        return (out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs))

    first = run()
    for _ in range(1 if runner.interpreted else 4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x [B, L, H, D] in other memory layouts."""
    batch, tokens, heads, dim = x.shape
    joint = x.new_zeros(batch, tokens, 3, heads, dim)
    joint[:, :, 1] = x
    spread = x.new_zeros(batch, tokens, heads, 2 * dim)
    spread[..., ::2] = x
    shifted = x.new_zeros(batch * tokens * heads * dim + 1)[1:].view(x.shape)  # not aligned to 8 bytes
    return {
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "one of a joint projection": joint[:, :, 1],
        "every second element": spread[..., ::2],
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "unaligned": shifted.copy_(x),
    }


@every_runner
def test_strides(runner: Runner) -> None:
    graph = graphs()["mesh"]
    topology = topology_of(graph, runner.device)
    plain_inputs = [x.detach() for x in random_inputs(runner, 2, len(graph.mask), 2, 16)]
    layouts = [_layouts(x) for x in plain_inputs]
    names = list(layouts[0])
    if runner.interpreted:
        names = names[1:3] if runner.dtype == torch.float32 else names[:1]
    gradients = cotangents(plain_inputs)
    want = attend(runner, leaves := [x.clone().requires_grad_() for x in plain_inputs], topology)
    exact = measured(*want, leaves, *gradients)
    tolerance = 16 * torch.finfo(runner.dtype).eps
    for name in names:
        inputs = [one[name].detach().requires_grad_() for one in layouts]
        assert all(torch.equal(x, y) for x, y in zip(inputs, plain_inputs, strict=True))
        out, lse = attend(runner, inputs, topology)
        strided = [_layouts(gradients[0])[name], gradients[1].transpose(1, 2).contiguous().transpose(1, 2)]
        result = measured(out, lse, inputs, *strided)
        for field, got, expected in zip(result._fields, result, exact, strict=True):
            close = torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
            assert close, f"{name}: {field} differs by {(got - expected).abs().max():.3g}"


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.dtype == torch.float16], ids=str)
def test_input_offsets_past_2_31_elements(runner: Runner) -> None:
    """The last batch element, token or head of the inputs and of the output's gradient lies past 2^31 elements."""
    graph = graphs()["hubs_only" if runner.interpreted else "mesh"]
    topology, tokens = topology_of(graph, runner.device), len(graph.mask)
    numbers = random_inputs(runner, 2, tokens, 2, 16, count=2)
    # Almost all of this memory is never touched, and on CPU never becomes real.
    storages = [torch.empty(2**31 + 2**16, dtype=torch.float16, device=runner.device) for _ in range(2)]
    far = (2**31, 32, 16, 1), (32, 2**31 // (tokens - 1) + 64, 16, 1), (32 * tokens, 32, 2**31, 1)
    for strides in far[:1] if runner.interpreted else far:
        x, grad = (
            storage.as_strided(like.shape, strides).copy_(like.detach())
            for storage, like in zip(storages, numbers, strict=True)
        )
        found = []
        for leaf, cotangent in ((x, grad), (x.contiguous(), grad.contiguous())):
            leaf = leaf.detach().requires_grad_()
            out, lse = attend(runner, [leaf, leaf, leaf], topology)
            found.append((out, lse, *torch.autograd.grad(out, leaf, cotangent)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3)


@every_runner
def test_shared_tokens_with_batch_stride_zero(runner: Runner) -> None:
    """Expanded inputs are read as they are, and their gradient sums over the batch."""
    graph = graphs()["asymmetric"]
    topology = topology_of(graph, runner.device)
    single = random_inputs(runner, 1, len(graph.mask), 2, 16)
    if runner.interpreted and runner.dtype != torch.float32:
        pytest.skip("the interpreter is slow; shared tokens are covered in float32")
    batch = 2 if runner.interpreted else 5
    expanded = [x.expand(batch, -1, -1, -1) for x in single]
    out, lse = attend(runner, expanded, topology)
    out_single, lse_single = attend(runner, single, topology)
    tolerance = 4 * torch.finfo(runner.dtype).eps
    torch.testing.assert_close(out, out_single.expand_as(out), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, lse_single.expand_as(lse), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(out.sum(), single)  # sum() gives a gradient whose strides are all 0
    for got, one in zip(grads, torch.autograd.grad(out_single.sum(), single), strict=True):
        torch.testing.assert_close(got, batch * one, rtol=8 * tolerance, atol=8 * batch * tolerance)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)], ids=["no batch", "no heads"])
@every_runner
def test_empty_inputs(runner: Runner, shape: tuple[int, int]) -> None:
    graph = graphs()["mesh"]
    inputs = random_inputs(runner, shape[0], len(graph.mask), shape[1], 16)
    options = {"dropout_p": 0.1, "seed": 1, "return_weights": True, "return_lse": True}
    out, weights, lse = topology_attention(
        *inputs, topology_of(graph, runner.device), backend=runner.backend, **options
    )
    assert out.shape == inputs[0].shape and lse.shape == (*shape, len(graph.mask))
    assert weights.to_dense().shape == (*shape, len(graph.mask), len(graph.mask))
    assert all(g.shape == inputs[0].shape for g in torch.autograd.grad(out.sum() + lse.sum(), inputs))


@float32_runner
def test_no_tokens(runner: Runner) -> None:
    topology = TokenTopology.from_faces([], 0).to(runner.device)
    inputs = random_inputs(runner, 2, 0, 2, 16)
    out, lse = attend(runner, inputs, topology)
    assert out.shape == (2, 0, 2, 16) and lse.shape == (2, 2, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.device == "cuda" and r.dtype == torch.float16], ids=str)
def test_more_than_2_to_31_elements(runner: Runner) -> None:
    """Offsets of the output pass 2^31; inputs are shared tokens, so that only outputs need the memory."""
    if runner.backend == "reference":
        pytest.skip("plain PyTorch would need hundreds of GiB")
    graph = Graph(random_mask(20, 3, 0.2, True, True, 5), 3, 128)
    single = [x.detach() for x in random_inputs(runner, 1, 23, 8, 128)]
    batch = 2**31 // (23 * 8 * 128) + 100
    topology = topology_of(graph, runner.device)
    inputs = [x.expand(batch, -1, -1, -1).requires_grad_() for x in single]
    out, lse = attend(runner, inputs, topology)
    want, want_lse = attend(runner, single, topology)
    # Another batch may be measured to run with other tiles, whose sums are rounded otherwise.
    torch.testing.assert_close(out[-1], want[0], rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse[-1], want_lse[0], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(want).expand_as(out))
    leaves = [x.clone().requires_grad_() for x in single]
    wanted = torch.autograd.grad(attend(runner, leaves, topology)[0].sum(), leaves)
    for got, one in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got[-1], one[0], rtol=4e-3, atol=4e-3)
