"""batch_norm whose residual has a norm of its own: against float64, its gradients, what it leaves, what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from batch_norm_cases import LARGE, LAST, SMALL, Given, check, given, options_of, ours, results
from fused_cases import FLOAT, HALF, Runner, everywhere, on_cuda, on_each_backend, on_triton, poisoned_memory, randn
from torch import Tensor

from fastmetro_kernels.batch_norm import (
    ResidualNorm,
    RunningMoments,
    batch_norm,
    batch_norm_twice,
    joint_ops,
    make_counters,
    ops,
)
from fastmetro_kernels.batch_norm.plan import CONFIGS

relus = pytest.mark.parametrize("relu", [False, True], ids=["norms", "relu"])


@everywhere
@relus
def test_against_float64(runner: Runner, relu: bool) -> None:
    for shape in SMALL + (LARGE if runner.device == "cuda" else []):
        check(runner, shape, True, relu, joint=True)


@on_triton
@relus
def test_half_precision_in_the_interpreter(runner: Runner, relu: bool) -> None:
    """Numbers are float32 in the kernels: they run there on float16, too."""
    for shape in SMALL[1:4]:
        check(Runner(runner.device, "triton", HALF), shape, True, relu, joint=True)


@everywhere
def test_a_mean_far_from_zero_keeps_digits(runner: Runner) -> None:
    check(runner, (2, 40, 6, 7), True, False, mean=100.0, joint=True)


@on_each_backend
def test_it_is_two_norms_one_behind_the_other(runner: Runner) -> None:
    """Each with its own epsilon."""
    tensors = given(runner, (2, 70, 4, 5), True, joint=True)
    x, weight, bias, residual = (tensors[name] for name in ("x", "weight", "bias", "residual"))
    second = ResidualNorm(tensors["residual_weight"], tensors["residual_bias"], epsilon=0.5)
    got = batch_norm(x, weight, bias, residual=residual, residual_norm=second, epsilon=2.0, backend=runner.backend)
    added = batch_norm(residual, second.weight, second.bias, epsilon=0.5, backend=runner.backend)
    expected = batch_norm(x, weight, bias, residual=added, epsilon=2.0, backend=runner.backend)
    eps = 8 * torch.finfo(runner.dtype).eps
    torch.testing.assert_close(got, expected, rtol=eps, atol=eps)


@on_each_backend
def test_other_memory_formats_and_strides(runner: Runner) -> None:
    tensors = given(runner, (2, 6, 4, 5), True, joint=True)
    expected = results(ours(runner.backend), tensors, True)
    other = tensors | {name: tensors[name].contiguous() for name in ("x", "residual", "grad")}
    other |= {name: torch.stack([tensors[name]] * 2, -1)[..., 1] for name in ("grad", "residual_weight", "weight")}
    for name, value in results(ours(runner.backend), other, True).items():
        assert torch.equal(value, expected[name]), name


@on_each_backend
@pytest.mark.parametrize("where", ["x", "residual"])
def test_what_is_no_number_stays_in_its_channel(runner: Runner, where: str) -> None:
    tensors = given(runner, (2, 7, 3, 5), True, joint=True)
    expected = results(ours(runner.backend), tensors, True)
    tensors[where][1, 4, 2, 2] = torch.nan
    got = results(ours(runner.backend), tensors, True)
    assert bool(got["out"][:, 4].isnan().all())
    assert bool(got["mean"][4].isnan()) == (where == "x") and bool(got["residual_mean"][4].isnan()) == (where != "x")
    kept = torch.tensor([channel for channel in range(7) if channel != 4], device=runner.device)
    for name, value in got.items():
        axis = 1 if value.dim() == 4 else 0
        assert torch.equal(value.index_select(axis, kept), expected[name].index_select(axis, kept)), name


INPUTS = ("x", "weight", "bias", "residual", "residual_weight", "residual_bias")


@on_each_backend
@relus
def test_every_subset_of_gradients(runner: Runner, relu: bool) -> None:
    """The same as when all are asked for; of two takers, too."""
    tensors = given(runner, (2, 9, 2, 3), True, joint=True)
    expected = results(ours(runner.backend), tensors, relu)
    subsets = [one for count in range(1, 7) for one in itertools.combinations(INPUTS, count)]
    assert len(subsets) == 63
    for number, asked in enumerate(subsets):
        leaves = {name: tensors[name].detach().requires_grad_(name in asked) for name in INPUTS}
        call = batch_norm_twice if number % 2 else batch_norm
        found = call(**options_of(leaves), relu=relu, backend=runner.backend)
        outs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outs, [tensors["grad"] / len(outs)] * len(outs))
        for name, leaf in leaves.items():
            if name in asked:
                assert leaf.grad is not None and torch.equal(leaf.grad, expected[f"grad_{name}"]), (name, asked)
            else:
                assert leaf.grad is None


@on_each_backend
@relus
def test_the_gradients_of_two_takers_are_added(runner: Runner, relu: bool) -> None:
    """Also where one of the two takes no gradient."""
    tensors = given(runner, (3, 70, 5, 7), True, joint=True)
    grads = tensors["grad"], randn(runner, 3, 70, 5, 7, seed=7).contiguous(memory_format=LAST)
    counters = make_counters(70, runner.device)
    for used in ((0, 1), (0,), (1,)):
        leaves = {name: tensors[name].detach().requires_grad_() for name in INPUTS}
        with poisoned_memory():
            pair = batch_norm_twice(**options_of(leaves), relu=relu, counters=counters, backend=runner.backend)
            assert pair[0].data_ptr() == pair[1].data_ptr() and pair[0] is not pair[1]
            torch.autograd.backward([pair[one] for one in used], [grads[one] for one in used])
        tensors["grad"] = torch.stack([grads[one] for one in used]).sum(0).contiguous(memory_format=LAST)
        expected = results(ours(runner.backend), tensors, relu)
        assert not counters.any()
        for name, leaf in leaves.items():
            eps, value = 4 * torch.finfo(runner.dtype).eps, expected[f"grad_{name}"]
            torch.testing.assert_close(leaf.grad, value, rtol=eps, atol=eps * float(value.abs().max()))


@on_each_backend
def test_gradients_do_not_share_their_memory(runner: Runner) -> None:
    """Those of the biases are the same numbers: an optimizer may still change one."""
    tensors = given(runner, (2, 9, 2, 3), True, joint=True)
    got = results(ours(runner.backend), tensors, True)
    assert torch.equal(got["grad_bias"], got["grad_residual_bias"])
    assert len({got[f"grad_{name}"].data_ptr() for name in INPUTS}) == len(INPUTS)


@on_each_backend
def test_running_averages_of_both(runner: Runner) -> None:
    """Those of PyTorch's modules, and the batches that they count; each has its own momentum."""
    tensors = given(runner, (2, 70, 3, 5), True, joint=True)
    wide = torch.promote_types(runner.dtype, FLOAT)
    modules = [torch.nn.BatchNorm2d(70, momentum=share, device=runner.device, dtype=wide) for share in (0.1, 0.7)]
    averages = [RunningMoments(*(torch.clone(one) for one in module.buffers()), module.momentum) for module in modules]
    for _ in range(3):
        for module, name in zip(modules, ("x", "residual"), strict=True):
            module(tensors[name].to(wide))
        second = ResidualNorm(tensors["residual_weight"], tensors["residual_bias"], averages[1])
        batch_norm(**options_of(tensors) | {"running": averages[0], "residual_norm": second}, backend=runner.backend)
        tensors["x"] = tensors["x"] * 1.5 + 1
    for mine, module in zip(averages, modules, strict=True):
        for one, other in zip(mine[:3], module.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert mine.batches == 3


@on_triton
def test_nothing_is_left_in_counters_and_equal_calls_give_equal_bits(runner: Runner) -> None:
    images = 4 if runner.device == "cuda" else 1  # the interpreter takes its time
    tensors = given(runner, (images, 130, 24, 11), True, joint=True)
    expected = results(ours("triton"), tensors, True)
    counters = make_counters(130, runner.device)

    def norm(leaves: Given, relu: bool, *moments: Tensor) -> Tensor:
        return batch_norm(**options_of(leaves, *moments), relu=relu, counters=counters, backend="triton")

    for _ in range(2):
        got = results(norm, tensors, True)
        assert not counters.any()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@on_cuda
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    tensors = given(runner, (32, 512, 28, 28), True, joint=True)
    first = results(ours("triton"), tensors, True)
    for _ in range(5):
        again = results(ours("triton"), tensors, True)
        assert all(torch.equal(first[name], again[name]) for name in first)


def _arguments(tensors: Given, running: bool, relu: bool, bits: bool) -> tuple[Any, ...]:
    """Of the forward op."""
    channels, device = tensors["x"].shape[1], tensors["x"].device
    averages: list[Any] = [None, None, None, 0.1] * 2
    if running:
        numbers = [torch.full((channels,), 0.5, device=device) for _ in range(4)]
        counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        averages = [*numbers[:2], counts[0], 0.1, *numbers[2:], counts[1], 0.2]
    leaves = [tensors[name] for name in ("x", "residual", "weight", "bias", "residual_weight", "residual_bias")]
    return *leaves, *averages, make_counters(channels, device), 1e-5, 1e-5, relu, bits, ()


@on_triton
def test_opcheck_and_compile(runner: Runner) -> None:
    tensors = given(runner, (2, 6, 4, 5), True, joint=True)
    for running, bits in ((False, True), (True, False)):
        torch.library.opcheck(joint_ops.batch_norm_joint_triton, _arguments(tensors, running, True, bits))
    made = joint_ops.batch_norm_joint_triton(*_arguments(tensors, False, True, True))
    _, mean, variance, residual_mean, residual_variance, bits = made
    vectors = tensors["weight"], mean, variance, tensors["residual_weight"], residual_mean, residual_variance
    counters = make_counters(6, runner.device)
    grad = tensors["grad"]
    for more, let in ((None, bits), (grad.clone(), bits), (grad.clone(), None), (None, None)):
        arguments = (grad, more, tensors["x"], tensors["residual"], let, *vectors, counters, 1e-5, 1e-5, ())
        torch.library.opcheck(joint_ops.batch_norm_joint_backward_triton, arguments)
    with pytest.raises(RuntimeError, match=r"bits must be uint8 \(1, 40, 8\), contiguous"):
        joint_ops.batch_norm_joint_backward_triton(*arguments[:4], bits[1:], *arguments[5:])
    assert not counters.any()
    expected = results(ours("triton"), tensors, True)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(ours("triton"), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for name, value in results(compiled, tensors, True).items():
            assert torch.equal(value, expected[name]), name


@on_triton
def test_bits_tell_where_the_result_is_positive(runner: Runner) -> None:
    """As those of one norm, which has tests of its own."""
    for shape in SMALL:
        tensors = given(runner, shape, True, joint=True)
        tensors["x"][0, 0, 0, 0] = torch.nan
        with poisoned_memory():
            out, *_, bits = joint_ops.batch_norm_joint_triton(*_arguments(tensors, False, True, True))
        let = (out > 0).permute(0, 2, 3, 1).flatten(0, 2)
        columns = (bits.transpose(0, 1).unsqueeze(3) >> torch.arange(8, device=bits.device) & 1).flatten(1)
        assert out.isnan().any() and bits.shape == ops.bits_shape(out)
        assert torch.equal(columns[:, : shape[1]].bool(), let) and not columns[:, shape[1] :].any()
    assert joint_ops.batch_norm_joint_triton(*_arguments(tensors, False, True, False))[-1].numel() == 0


@on_triton
def test_every_tile(runner: Runner) -> None:
    tensors = given(runner, (3, 70, 9, 11), True, joint=True)

    def norm(config: Any) -> Any:
        return lambda leaves, relu, *moments: batch_norm(
            **options_of(leaves, *moments), relu=relu, config=config, backend="triton"
        )

    pinned = results(norm(None), tensors, True)
    for config in CONFIGS:
        for name, value in results(norm(config), tensors, True).items():
            rounding = max(1e-4, torch.finfo(value.dtype).eps)
            torch.testing.assert_close(value, pinned[name], rtol=rounding, atol=1e-4)


X, W = torch.zeros(2, 3, 4, 5), torch.zeros(3)


@pytest.mark.parametrize(
    ("residual", "norm", "error", "message"),
    [
        (None, ResidualNorm(W, W), ValueError, "residual_norm is there, but no residual"),
        (X, (W, W), TypeError, "residual_norm must be ResidualNorm, got tuple"),
        (X, ResidualNorm(W[:2], W), ValueError, r"residual_norm.weight must be \[3\], got \[2\]"),
        (X, ResidualNorm(W, W.half()), TypeError, "residual_norm.bias"),
        (X, ResidualNorm(W, W, epsilon=-1.0), ValueError, "residual_norm.epsilon"),
        (X, ResidualNorm(W, W, (W, W)), TypeError, "residual_norm.running must be RunningMoments, got tuple"),
        (X, ResidualNorm(W, W, RunningMoments(W, W[:1])), ValueError, r"residual_norm.running.variance must be \[3\]"),
        (X, ResidualNorm(W, W, RunningMoments(W, W, W)), TypeError, "residual_norm.running.batches"),
        (X, ResidualNorm(W, W, RunningMoments(W, W, None, math.inf)), ValueError, "residual_norm.running.momentum"),
        (X[:1], ResidualNorm(W, W), ValueError, r"residual must be \[2, 3, 4, 5\] like x"),
    ],
)
def test_refused(residual: Any, norm: Any, error: type[Exception], message: str) -> None:
    for call in (batch_norm, batch_norm_twice):
        with pytest.raises(error, match=message):
            call(X, W, W, residual=residual, residual_norm=norm)
