"""residual_norm and its gradients against float64 on every backend, device and dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_cases import DOUBLE, FLOAT, HALF, Runner, everywhere, on_each_backend, poisoned_memory
from residual_norm_cases import SEED, Given, P, Shape, factors, given, operands, ours, plain, results
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.residual_norm import final_residual_norm, residual_norm
from fastmetro_kernels.residual_norm.plan import WIDEST

# Of the branch, and of the stream: a row, odd widths, several rows of a program, samples that share the stream.
SMALL: list[tuple[Shape, Shape]] = [
    ((1, 2), (1, 2)), ((7,), (7,)), ((5, 3, 33), (5, 3, 33)), ((3, 11, 64), (1, 11, 64)), ((19, 128), (19, 128)),
    ((2, 3, 130), (1, 3, 130)),
]  # fmt: skip
LARGE: list[tuple[Shape, Shape]] = [
    ((32, 445, 512), (1, 445, 512)), ((32, 445, 128), (32, 445, 128)), ((32, 445, 64), (32, 445, 64)),
    ((32, 50, 512), (32, 50, 512)), ((1031, 1024), (1031, 1024)), ((257, 777), (257, 777)), ((3, WIDEST), (3, WIDEST)),
]  # fmt: skip


def check(runner: Runner, tensors: Given, p: float, used: str = "both", dtype: torch.dtype | None = None) -> None:
    mask = factors(tensors, p)
    with poisoned_memory():
        got = results(lambda leaves: ours(leaves, runner, p, dtype), tensors, used)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = results(lambda leaves: plain(leaves, mask, DOUBLE), doubles, used)
    near = results(lambda leaves: plain(leaves, mask, dtype), tensors, used)
    assert set(got) == set(exact) | ({"grad_weight", "grad_bias"} & set(got))
    for name, value in exact.items():
        one, other = got[name], near[name]
        assert one.dtype == other.dtype and one.shape == value.shape and one.is_contiguous(), name
        # The new stream may be rounded to its neighbour: then its row's norm is of another row, by so much.
        coarse = torch.finfo(got["new_stream"].dtype).eps if "weight" not in name and "bias" not in name else 0.0
        rounding = (2 * torch.finfo(one.dtype).eps + 2 * coarse) * (value.abs() + 4)
        if one.dtype == DOUBLE:
            rounding = rounding + 1e-10 * (1 + value.abs())
        error, allowed = (one.double() - value).abs(), 2 * (other.double() - value).abs().amax()
        wrong = ~(error <= allowed + rounding)
        assert not wrong.any(), f"{name}: {error[wrong].max():.3g}, allowed {float(allowed):.3g}"


@everywhere
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(runner: Runner, p: float, biased: bool) -> None:
    for shape, stream in SMALL + (LARGE if runner.device == "cuda" else []):
        check(runner, given(runner, shape, stream, biased=biased), p)


@everywhere
@pytest.mark.parametrize("stream_dtype", [FLOAT, HALF, torch.bfloat16])
def test_mixed_dtypes(runner: Runner, stream_dtype: torch.dtype) -> None:
    """A stream, a branch and a norm of dtypes of their own."""
    if runner.interpreted and stream_dtype != FLOAT:
        pytest.skip("the interpreter has no arithmetic of half precision of its own")
    tensors = given(runner, (3, 5, 24), (1, 5, 24), stream_dtype)
    for dtype in (None, FLOAT, HALF) if not runner.interpreted else (None,):
        for p in (0.0, P):
            check(runner, tensors, p, dtype=dtype)
    promoted = torch.promote_types(runner.dtype, stream_dtype)
    new, normed = ours(tensors, runner, dtype=FLOAT)
    assert new.dtype == promoted and normed.dtype == FLOAT


@on_each_backend
@pytest.mark.parametrize("p", [0.0, P])
def test_a_branch_in_half_precision(runner: Runner, p: float) -> None:
    """Beside a stream and a norm in float32, where the interpreter can run it, too: it only converts."""
    tensors = given(Runner(runner.device, runner.backend, FLOAT), (4, 3, 20), (1, 3, 20))
    check(runner, tensors | {"branch": tensors["branch"].half()}, p)


@on_each_backend
@pytest.mark.parametrize("used", ["new", "normed"])
def test_one_of_the_results_is_used(runner: Runner, used: str) -> None:
    for p in (0.0, P):
        check(runner, given(runner, (4, 3, 20), (1, 3, 20)), p, used)


@on_each_backend
def test_the_norm_alone_behind_the_last_layer(runner: Runner) -> None:
    tensors = given(runner, (4, 20), (4, 20))
    expected = results(lambda leaves: ours(leaves, runner), tensors, "normed")

    def final(leaves: Given) -> tuple[Tensor, Tensor]:
        normed = final_residual_norm(**leaves, dropout_p=P, seed=SEED, backend=runner.backend)
        return normed, normed

    got = results(final, tensors, "normed")
    assert all(torch.equal(got[name], expected[name]) for name in expected if name != "new_stream")


@on_each_backend
@pytest.mark.parametrize("used", ["both", "new", "normed"])
def test_without_a_branch(runner: Runner, used: str) -> None:
    tensors = given(runner, (4, 3, 20), (4, 3, 20))

    def alone(leaves: Given) -> Any:
        new, normed = residual_norm(leaves["stream"], None, leaves["weight"], leaves["bias"], dropout_p=P,
                                    backend=runner.backend)  # fmt: skip
        assert new is leaves["stream"]
        return new * 1, normed

    def layer_norm(leaves: Given) -> Any:
        return leaves["stream"] * 1, F.layer_norm(leaves["stream"], (20,), leaves["weight"].to(leaves["stream"].dtype),
                                                  leaves["bias"].to(leaves["stream"].dtype))  # fmt: skip

    expected = results(layer_norm, {name: one.double() for name, one in tensors.items()}, used)
    for name, value in results(alone, tensors, used).items():
        eps = 8 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), expected[name], rtol=eps, atol=eps * 8, msg=lambda text: name + text)  # noqa: B023


@on_each_backend
@pytest.mark.parametrize(
    "asked", ["stream", "branch", "weight", "bias", "branch_bias", "stream branch", "branch bias", "branch branch_bias"]
)
def test_only_the_gradients_that_are_asked_for(runner: Runner, asked: str) -> None:
    for p in (0.0, P):
        for stream in ((3, 4, 20), (1, 4, 20)):
            tensors = given(runner, (3, 4, 20), stream)
            expected = results(lambda leaves: ours(leaves, runner, p), tensors)  # noqa: B023
            leaves = {name: one.detach().requires_grad_(name in asked.split()) for name, one in tensors.items()}
            new, normed = ours(leaves, runner, p)
            torch.autograd.backward((new, normed), (tensors["more"], tensors["grad"])) if new.requires_grad else (
                normed.backward(tensors["grad"])
            )
            for name in operands(tensors):
                grad = leaves[name].grad
                assert (grad is None) == (name not in asked.split())
                assert grad is None or torch.equal(grad, expected[f"grad_{name}"]), (name, p, stream)


def test_without_gradients() -> None:
    with torch.no_grad():
        x, w = torch.zeros(2, 3, 4), torch.zeros(4)
        assert not residual_norm(x, x, w.clone().requires_grad_(), w)[1].requires_grad


@on_each_backend
def test_strides(runner: Runner) -> None:
    tensors = given(runner, (4, 6, 20), (4, 6, 20))
    expected = results(lambda leaves: ours(leaves, runner), tensors)
    other = {name: torch.stack([one, one], -1)[..., 1] if one.dim() == 1 else one.transpose(0, 1).contiguous()
             .transpose(0, 1) for name, one in tensors.items()}  # fmt: skip
    assert not any(one.is_contiguous() for one in other.values())
    for name, value in results(lambda leaves: ours(leaves, runner), other).items():
        if runner.backend == "reference" and name == "grad_branch_bias":  # PyTorch sums in the order of memory
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(value, expected[name]), name
    new, normed = ours(tensors | {"stream": tensors["stream"][:1].expand(4, -1, -1)}, runner)
    alone = ours(tensors | {"stream": tensors["stream"][:1]}, runner)
    assert torch.equal(new, alone[0]) and torch.equal(normed, alone[1])


@on_each_backend
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 4, 8)])
def test_empty(runner: Runner, shape: Shape) -> None:
    tensors = given(runner, shape, shape)
    with poisoned_memory():
        got = results(lambda leaves: ours(leaves, runner), tensors)
    assert got["normed"].shape == got["grad_branch"].shape == shape
    for name in ("grad_weight", "grad_bias", "grad_branch_bias"):
        assert got[name].shape == (8,) and not got[name].any()


@on_each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["stream", "branch", "grad", "more"])
def test_what_is_no_number_stays_in_its_row(runner: Runner, where: str, value: float) -> None:
    """As in PyTorch: also where it is dropped, and in the gradients of weight and bias."""
    tensors = given(runner, (6, 20), (6, 20))
    mask = factors(tensors, P)
    tensors[where][2, 7] = value
    tensors[where][4, int((mask[4] == 0).nonzero()[0])] = value
    got = results(lambda leaves: ours(leaves, runner), tensors)
    expected = results(lambda leaves: plain(leaves, mask), tensors)
    for name, one in expected.items():
        finite = one.isfinite()
        assert torch.equal(got[name].isfinite(), finite), name
        if math.isnan(value) or "grad" not in name:  # what an infinite gradient becomes the order of sums decides
            assert torch.equal(got[name].isnan(), one.isnan()), name
        # Plain PyTorch rounds what it hands on in half precision, also on the way to float32 gradients.
        eps = max(64 * torch.finfo(one.dtype).eps, 16 * torch.finfo(runner.dtype).eps)
        torch.testing.assert_close(got[name][finite], one[finite], rtol=eps, atol=4 * eps)


@on_each_backend
def test_rows_of_equal_numbers(runner: Runner) -> None:
    x = torch.full((3, 40), 7.25, dtype=runner.dtype, device=runner.device)
    weight = torch.ones(40, device=runner.device)
    _, normed = residual_norm(x, x, weight, 3 * weight, backend=runner.backend)
    assert bool((normed == 3).all())
