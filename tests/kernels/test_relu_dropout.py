"""relu_dropout and its gradient on every backend, device and dtype; its random numbers; what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_cases import DOUBLE, FLOAT, Runner, everywhere, on_cuda, on_each_backend, on_triton, poisoned_memory, randn
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.dropout import ops, relu_dropout
from fastmetro_kernels.dropout.random import kept, philox, scale_of_kept, threshold
from fastmetro_kernels.seeds import draw_seeds

# More than a program's 4,096, and no multiple of it; a scalar.
SMALL = [(1,), (7,), (3, 5, 9), (2, 8), (33, 64), (4120,), ()]
LARGE = [(14240, 2048), (14240, 509), (1 << 20,)]
# With a bias: rows of a multiple of 8 have kernels of their own, of 256 columns and 8 or 16 rows at a time, or more.
SMALL_BIASED = [(1,), (8,), (3, 5, 9), (2, 8), (33, 64), (21, 264), (3, 5, 40), (1030, 8)]
LARGE_BIASED = [(14240, 2048), (3136, 512), (3137, 520), (14240, 509), (200_000, 16)]
SEED = 0x0123_4567_89AB_CDEF
PROBABILITIES = (0.0, 0.1, 0.5)


def factors(x: Tensor, p: float, seed: int = SEED) -> Tensor:
    """What x is multiplied by behind its ReLU, float64."""
    stays = kept(torch.tensor([seed], device=x.device), 1, x.numel(), p).view(x.shape)
    return stays.double() * scale_of_kept(p if p else 0.0)


def results(
    x: Tensor, grad: Tensor, p: float, backend: str, seed: Any = SEED, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The result and the gradients of x and, if there is one, of the bias."""
    leaves = [one.detach().requires_grad_() for one in (x, bias) if one is not None]
    out = relu_dropout(leaves[0], p, bias=leaves[1] if bias is not None else None, seed=seed, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def both(x: Tensor, grad: Tensor, p: float, backend: str, seed: Any = SEED) -> tuple[Tensor, Tensor]:
    """The result and the gradient, without a bias."""
    out, grad_x = results(x, grad, p, backend, seed)
    return out, grad_x


def bias_of(runner: Runner, width: int) -> Tensor:
    return randn(runner, width, seed=2).to(torch.promote_types(runner.dtype, FLOAT))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_numbers_are_those_of_the_paper(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    """The known answers of Salmon et al.'s own code for Philox4x32-10."""
    given: Any = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(torch.tensor(key), given)) == words


@everywhere
@pytest.mark.parametrize("p", PROBABILITIES)
def test_against_float64(runner: Runner, p: float) -> None:
    """Rounded once; the gradient is that of what was kept and positive, as the mask of the specification has it."""
    for shape in SMALL + (LARGE if runner.device == "cuda" else []):
        x, grad = randn(runner, *shape), randn(runner, *shape, seed=1)
        mask = factors(x, p)
        with poisoned_memory():
            out, grad_x = both(x, grad, p, runner.backend)
        assert out.dtype == grad_x.dtype == x.dtype and out.shape == grad_x.shape == x.shape
        eps = torch.finfo(runner.dtype).eps if runner.dtype != DOUBLE else 1e-15
        for got, exact in ((out, x.double().relu() * mask), (grad_x, torch.where(x > 0, grad.double() * mask, 0.0))):
            assert torch.equal(got == 0, exact.to(got.dtype) == 0)
            assert bool(((got.double() - exact).abs() <= eps * exact.abs() + 1e-7 * (runner.dtype.itemsize == 2)).all())


@everywhere
@pytest.mark.parametrize("p", PROBABILITIES)
def test_a_bias_against_float64(runner: Runner, p: float) -> None:
    """The sum is rounded only as a part of the result, and a gradient not before it is summed for the bias. Of what is
    kept and positive the result tells; the mask is the same as without a bias."""
    for shape in SMALL_BIASED + (LARGE_BIASED if runner.device == "cuda" else []):
        x, grad, bias = randn(runner, *shape), randn(runner, *shape, seed=1), bias_of(runner, shape[-1])
        mask = factors(x, p)
        with poisoned_memory():
            out, grad_x, grad_bias = results(x, grad, p, runner.backend, bias=bias)
        assert out.dtype == grad_x.dtype == x.dtype and out.shape == grad_x.shape == x.shape
        assert grad_bias.dtype == bias.dtype and grad_bias.shape == bias.shape
        eps, wide = (torch.finfo(dtype).eps for dtype in (x.dtype, bias.dtype))
        exact = (x.double() + bias.double()).relu() * mask
        allowed = eps * exact.abs() + 4 * wide * (x.double().abs() + bias.double().abs()) * (mask + 1)
        assert bool(((out.double() - exact).abs() <= allowed + 1e-7 * (x.dtype.itemsize == 2)).all())
        assert not out[mask == 0].any()
        exact = torch.where(out > 0, grad.double() * mask, 0.0)
        assert torch.equal(grad_x == 0, exact.to(grad_x.dtype) == 0)
        assert bool(((grad_x.double() - exact).abs() <= 2 * eps * exact.abs() + 1e-7 * (x.dtype.itemsize == 2)).all())
        # So many roundings of float32 that a sum of pieces, each of which is shorter than this, can have at most.
        rows = max(x.numel() // shape[-1], 1)
        roundings = wide * (min(rows, 64) + math.log2(rows) + 4)
        terms = exact.view(rows, shape[-1])
        assert bool(((grad_bias.double() - terms.sum(0)).abs() <= roundings * terms.abs().sum(0)).all())


@on_each_backend
def test_a_bias_of_zero_changes_nothing(runner: Runner) -> None:
    """The same elements are dropped, by the kernels for rows as by those for a line."""
    for shape in SMALL_BIASED:
        x, grad = randn(runner, *shape), randn(runner, *shape, seed=1)
        found = results(x, grad, 0.5, runner.backend, bias=torch.zeros_like(bias_of(runner, shape[-1])))
        for one, same in zip(found, both(x, grad, 0.5, runner.backend), strict=False):
            assert torch.equal(one, same)


@on_each_backend
def test_only_the_gradients_that_are_asked_for(runner: Runner) -> None:
    """And strides, of everything."""
    for width in (24, 9):
        x, grad, bias = randn(runner, 5, width), randn(runner, 5, width, seed=1), bias_of(runner, width)
        expected = results(x, grad, 0.5, runner.backend, bias=bias)
        given, more = x.t().contiguous().t(), torch.stack([bias, bias], -1)[:, 0]
        for asked in ((True, False), (False, True), (True, True)):
            leaves = [given.detach().requires_grad_(asked[0]), more.detach().requires_grad_(asked[1])]
            out = relu_dropout(leaves[0], 0.5, bias=leaves[1], seed=SEED, backend=runner.backend)
            out.backward(grad.t().contiguous().t())
            assert torch.equal(out.detach(), expected[0])
            for leaf, one_asked, value in zip(leaves, asked, expected[1:], strict=True):
                assert (leaf.grad is not None) == one_asked
                if leaf.grad is not None:
                    torch.testing.assert_close(leaf.grad, value, rtol=1e-5, atol=1e-5)


@on_triton
def test_programs_with_several_tiles(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last ones are not full."""
    triton = pytest.importorskip("fastmetro_kernels.dropout.triton")
    for shape in ((45, 264), (1030, 8), (9, 256)):
        x, grad, bias = randn(runner, *shape), randn(runner, *shape, seed=1), bias_of(runner, shape[-1])
        expected = results(x, grad, 0.5, "triton", bias=bias)
        monkeypatch.setattr(triton, "PROGRAMS", 5)
        found = results(x, grad, 0.5, "triton", bias=bias)
        monkeypatch.undo()
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-4)


@on_cuda
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    x, grad, bias = randn(runner, 14240, 2048), randn(runner, 14240, 2048, seed=1), bias_of(runner, 2048)
    first = results(x, grad, 0.1, "triton", bias=bias)
    for _ in range(5):
        assert all(map(torch.equal, first, results(x, grad, 0.1, "triton", bias=bias)))


@on_triton
def test_both_backends_give_equal_bits(runner: Runner) -> None:
    for shape in SMALL:
        x, grad = randn(runner, *shape), randn(runner, *shape, seed=1)
        for p in (*PROBABILITIES, 0.9999):
            for seed in (0, -1, SEED, -(2**63)):
                one, same = (both(x, grad, p, backend, seed) for backend in ("triton", "reference"))
                assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_as_many_are_kept_as_should_be(p: float) -> None:
    """Of all, of each row and column, each of eight places; and neighbours do not hang together: five deviations."""
    rows, width = 512, 1024
    stays = kept(torch.tensor([7]), rows, width, p).double()
    assert float(stays.mean()) == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / stays.numel()))
    for axis, count in ((0, rows), (1, width)):
        assert float((stays.mean(axis) - (1 - p)).abs().max()) < 5.5 * math.sqrt(p * (1 - p) / count)
    places = stays.view(-1, 8).mean(0)
    assert float((places - (1 - p)).abs().max()) < 5 * math.sqrt(p * (1 - p) * 8 / stays.numel())
    apart = (stays - (1 - p)) / math.sqrt(p * (1 - p))
    neighbours = [apart[1:] * apart[:-1], *(apart[:, step:] * apart[:, :-step] for step in (1, 2, 4, 8))]
    of_the_next_seed = kept(torch.tensor([8]), rows, width, p).double()
    neighbours.append(apart * (of_the_next_seed - (1 - p)) / math.sqrt(p * (1 - p)))
    for product in neighbours:
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel())


def test_probabilities_are_rounded() -> None:
    assert [threshold(p) for p in (0.0, 1e-9, 0.5, 0.1, 1 - 1e-9)] == [0, 0, 32768, 6554, 65535]
    assert scale_of_kept(0.5) == 2.0 and scale_of_kept(0.1) == 65536 / (65536 - 6554)


def test_a_long_row_counts_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups from 2^32 on are told from those before: the second word of the counter goes on."""
    arange = torch.arange
    seed = torch.tensor([3])
    first = kept(seed, 1, 64, 0.5)
    monkeypatch.setattr(torch, "arange", lambda n, **options: arange(n, **options) + (2**32 if n > 1 else 0))
    far = kept(seed, 1, 64, 0.5)
    monkeypatch.undo()
    assert not torch.equal(first, far) and torch.equal(far, kept(seed, 2, 64, 0.5)[1:])


@on_each_backend
def test_what_is_no_number(runner: Runner) -> None:
    """NaN stays, kept or dropped, and has no gradient; infinity stays where it is kept. As in PyTorch."""
    x = randn(runner, 4, 16).abs()
    x[1], x[2], x[3] = math.nan, math.inf, -math.inf
    out, grad = both(x, torch.ones_like(x), 0.5, runner.backend)
    stays = factors(x, 0.5) > 0
    assert bool(out[1].isnan().all()) and not bool(grad[1].any()) and not bool(out[3].any() | grad[3].any())
    assert bool((out[2].isinf() == stays[2]).all() and (out[2].isnan() == ~stays[2]).all())
    whole = relu_dropout(x, 0.0, backend=runner.backend)
    assert torch.equal(whole.nan_to_num(-1.0), x.relu().nan_to_num(-1.0))
    given = torch.full_like(x, math.nan)
    _, grad = both(randn(runner, 4, 16), given, 0.5, runner.backend)
    out, _ = both(randn(runner, 4, 16), given, 0.5, runner.backend)
    assert torch.equal(grad.isnan(), out > 0)
    bias = torch.zeros(16, device=runner.device)
    found, _, grad_bias = results(x[1:], torch.ones_like(x[1:]), 0.5, runner.backend, bias=bias)
    assert bool(found[0].isnan().all() and grad_bias.isfinite().all()) and not bool(found[2].any())
    bias[3] = math.nan
    assert torch.equal(results(x[:1], x[:1], 0.5, runner.backend, bias=bias)[0].isnan(), bias.isnan()[None])


@on_each_backend
@pytest.mark.parametrize("shape", [(0,), (3, 0, 8)])
def test_empty(runner: Runner, shape: tuple[int, ...]) -> None:
    x = randn(runner, *shape)
    out, grad = both(x, x, 0.5, runner.backend)
    assert out.shape == grad.shape == shape
    with poisoned_memory():
        found = results(x, x, 0.5, runner.backend, bias=bias_of(runner, shape[-1]))
    assert [one.shape for one in found] == [shape, shape, shape[-1:]] and not found[2].any()


@on_each_backend
def test_strides_and_seeds(runner: Runner) -> None:
    x, grad = randn(runner, 5, 24), randn(runner, 5, 24, seed=1)
    expected = both(x, grad, 0.5, runner.backend)
    other = x.t().contiguous().t()
    for seed in (SEED, torch.tensor(SEED, device=runner.device), torch.tensor([[SEED]], device=runner.device)):
        found = both(other, grad.t().contiguous().t(), 0.5, runner.backend, seed)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[0].is_contiguous()
    torch.manual_seed(1)
    first, second = (relu_dropout(x, 0.5, backend=runner.backend) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, relu_dropout(x, 0.5, backend=runner.backend)) and not torch.equal(first, second)
    aligned = draw_seeds(5, torch.device(runner.device))
    assert len({int(seed) for seed in aligned}) == 5 and all(seed.data_ptr() % 16 == 0 for seed in aligned)


def test_without_gradients() -> None:
    with torch.no_grad():
        assert not relu_dropout(torch.ones(8, requires_grad=True), 0.1).requires_grad
    out = relu_dropout(torch.ones(8), 0.1, backend="reference")
    assert not out.requires_grad


@on_triton
def test_opcheck(runner: Runner) -> None:
    x, seed = randn(runner, 3, 17), torch.tensor([5], device=runner.device)
    torch.library.opcheck(ops.dropout_kept, (seed, 3, 17, 0.5))
    for given in (seed, None):
        torch.library.opcheck(ops.relu_dropout_triton, (x, None, given, 0.5))
        torch.library.opcheck(ops.relu_dropout_triton, (randn(runner, 3, 16), torch.ones(16).to(x.device), given, 0.5))
    for biased in (False, True):
        torch.library.opcheck(ops.relu_dropout_backward_triton, (x, x.relu(), 0.5, biased))


@on_each_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(runner: Runner, dynamic: bool) -> None:
    def call(x: Tensor) -> Tensor:
        options: Any = {"seed": SEED, "backend": runner.backend}
        rows = relu_dropout(x.view(-1, 8), 0.5, bias=x.view(-1, 8)[0].float(), **options).view_as(x)
        odd = relu_dropout(x, 0.5, bias=x[0].float(), **options)
        return relu_dropout(x * 2, 0.5, **options) * 3 + relu_dropout(x, 0.0) + rows + odd

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (16, 24):
        x = randn(runner, size, 5).requires_grad_()
        expected, got = call(x), compiled(x)
        assert torch.equal(got, expected)
        grads = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (got, expected)]
        assert torch.equal(*grads)


@on_cuda
def test_in_a_graph(runner: Runner) -> None:
    x = randn(runner, 64, 128)
    for _ in range(2):
        both(x, x, 0.5, "triton", None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = both(x, x, 0.5, "triton", None)
        fixed = both(x, x, 0.5, "triton", SEED)
    graph.replay()
    assert all(torch.equal(one, same) for one, same in zip(fixed, both(x, x, 0.5, "triton"), strict=True))
    before = drawn[0].clone()
    graph.replay()
    assert not torch.equal(before, drawn[0]) and torch.equal(drawn[1] != 0, (drawn[0] > 0) & (x != 0))


X, B = torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "p", "options", "error", "message"),
    [
        (X.int(), 0.1, {}, TypeError, "x must be one of float32, float16, bfloat16, float64, got torch.int32"),
        (None, 0.1, {}, TypeError, "x must be a tensor, got NoneType"),
        (X, 1.0, {}, ValueError, r"p must be in \[0, 1\), got 1.0"),
        (X, -0.1, {}, ValueError, r"p must be in \[0, 1\), got -0.1"),
        (X, "a", {}, TypeError, "p must be a float, got str"),
        (X, 0.1, {"seed": 2**63}, ValueError, "seed must fit 64 bits"),
        (X, 0.1, {"seed": X}, TypeError, "seed must be int64, got torch.float32"),
        (X, 0.1, {"seed": X.long()}, ValueError, r"seed must have one element, got shape \[2, 3\]"),
        (X, 0.1, {"seed": True}, TypeError, "seed must be an int, an int64 tensor or None, got bool"),
        (X, 0.1, {"bias": B[:2]}, ValueError, r"bias must be \[3\], got \[2\]"),
        (X, 0.1, {"bias": X}, ValueError, r"bias must be \[3\], got \[2, 3\]"),
        (X[0, 0], 0.1, {"bias": B}, ValueError, r"x must be \[..., C\] with a bias, got \[\]"),
        (X, 0.1, {"bias": B.half()}, TypeError, "bias must be one of float32, got torch.float16"),
        (X.double(), 0.1, {"bias": B}, TypeError, "bias must be one of float64, got torch.float32"),
        (X, 0.1, {"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        (X, 0.1, {"bias": B.to("meta")}, ValueError, "bias must be on cpu, got meta"),
        (X, 0.1, {"backend": "cudnn"}, ValueError, "backend='cudnn' is not known"),
        (X.double(), 0.1, {"backend": "triton"}, BackendUnavailable, "float64"),
    ],
)
def test_refused(x: Any, p: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        relu_dropout(x, p, **options)


@on_triton
def test_the_ops_refuse_what_does_not_fit(runner: Runner) -> None:
    x = torch.zeros(4, 6, device=runner.device, dtype=FLOAT)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        ops.relu_dropout_triton(x.t(), None, None, 0.1)
    with pytest.raises(RuntimeError, match="seed must be one int64"):
        ops.relu_dropout_triton(x, None, x, 0.1)
    with pytest.raises(RuntimeError, match=r"x must have rows of a multiple of 8 with a bias, got \(4, 6\)"):
        ops.relu_dropout_triton(x, x[0], None, 0.1)
    with pytest.raises(RuntimeError, match=r"bias must be float32 \[24\]"):
        ops.relu_dropout_triton(x.view(1, 24), x[0], None, 0.1)
    with pytest.raises(RuntimeError, match=r"grad must be torch\.float32"):
        ops.relu_dropout_backward_triton(x[:2], x, 0.1, False)
