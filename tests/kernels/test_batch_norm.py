"""batch_norm and its gradients against float64 on every backend, device and dtype; what it refuses; how it compiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batch_norm_cases import LARGE, LAST, MOMENTUM, SMALL, Given, check, given, kinds, options_of, ours, results
from compilation import compile_report, needs_triton
from fused_cases import (
    FLOAT,
    HALF,
    Runner,
    everywhere,
    on_cuda,
    on_each_backend,
    on_triton,
    randn,
)
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.batch_norm import RunningMoments, batch_norm, batch_norm_twice, make_counters, ops, reference
from fastmetro_kernels.batch_norm.plan import CONFIGS, BatchNormConfig, pinned, plan


@everywhere
@kinds
def test_against_float64(runner: Runner, residual: bool, relu: bool) -> None:
    for shape in SMALL + (LARGE if runner.device == "cuda" and not (residual ^ relu) else []):
        check(runner, shape, residual, relu)


@everywhere
def test_a_mean_far_from_zero_keeps_digits(runner: Runner) -> None:
    check(runner, (2, 40, 6, 7), False, False, mean=100.0)


@on_each_backend
def test_other_memory_formats_and_strides(runner: Runner) -> None:
    tensors = given(runner, (2, 6, 4, 5), True)
    expected = results(ours(runner.backend), tensors, True)
    other = tensors | {name: tensors[name].contiguous() for name in ("x", "residual", "grad")}
    other["grad"] = torch.stack([other["grad"], other["grad"]], -1)[..., 1]
    for name, value in results(ours(runner.backend), other, True).items():
        assert torch.equal(value, expected[name]), name


@on_each_backend
def test_what_is_no_number_stays_in_its_channel(runner: Runner) -> None:
    tensors = given(runner, (2, 7, 3, 5), False)
    expected = results(ours(runner.backend), tensors, True)
    tensors["x"][1, 4, 2, 2] = torch.nan
    got = results(ours(runner.backend), tensors, True)
    others = [channel for channel in range(7) if channel != 4]
    assert bool(got["out"][:, 4].isnan().all()) and bool(got["mean"][4].isnan()) and bool(got["variance"][4].isnan())
    for name, value in got.items():
        axis = 1 if value.dim() == 4 else 0
        kept = torch.tensor(others, device=value.device)
        assert torch.equal(value.index_select(axis, kept), expected[name].index_select(axis, kept)), name


@on_each_backend
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("asked", ["x", "weight", "residual", "x weight bias", "x residual"])
def test_only_the_gradients_that_are_asked_for(runner: Runner, asked: str, relu: bool) -> None:
    """The same as when all are: of a residual that asks for none (an image, frozen layers), too."""
    tensors = given(runner, (2, 6, 4, 5), True)
    expected = results(ours(runner.backend), tensors, relu)
    leaves = {name: one.detach().requires_grad_(name in asked.split()) for name, one in tensors.items()}
    for twice in (False, True):
        for leaf in leaves.values():
            leaf.grad = None
        call = batch_norm_twice if twice else batch_norm
        found = call(leaves["x"], leaves["weight"], leaves["bias"], residual=leaves["residual"], relu=relu,
                     backend=runner.backend)  # fmt: skip
        outs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outs, [tensors["grad"] / len(outs)] * len(outs))
        for name, leaf in leaves.items():
            if name in asked.split():
                assert torch.equal(leaf.grad, expected[f"grad_{name}"]), (name, twice)
            else:
                assert leaf.grad is None


@on_each_backend
def test_without_gradients(runner: Runner) -> None:
    tensors = given(runner, (2, 6, 4, 5), False)
    leaves = [tensors[name].requires_grad_() for name in ("x", "weight", "bias")]
    assert batch_norm(*leaves, backend=runner.backend).requires_grad
    with torch.no_grad():
        assert not batch_norm(*leaves, backend=runner.backend).requires_grad


@on_each_backend
def test_running_averages(runner: Runner) -> None:
    """Those of PyTorch's module, and the batches that it counts."""
    tensors = given(runner, (2, 70, 3, 5), False)
    module = torch.nn.BatchNorm2d(70, device=runner.device, dtype=torch.promote_types(runner.dtype, FLOAT))
    mean, variance, batches = (torch.clone(one) for one in module.buffers())
    for _ in range(3):
        module(tensors["x"].to(mean.dtype))
        running = RunningMoments(mean, variance, batches)
        batch_norm(tensors["x"], tensors["weight"], tensors["bias"], running=running, backend=runner.backend)
        tensors["x"] = tensors["x"] * 1.5 + 1
    for ours_, theirs in zip((mean, variance, batches), module.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)
    assert batches == 3


@on_each_backend
@kinds
def test_the_gradients_of_two_takers_are_added(runner: Runner, residual: bool, relu: bool) -> None:
    """As autograd adds them, but for the rounding of the sum; also where one of the two takes no gradient."""
    tensors = given(runner, (3, 70, 5, 7), residual)
    other = randn(runner, 3, 70, 5, 7, seed=5).contiguous(memory_format=LAST)
    counters = make_counters(70, runner.device)

    def taken(grads: list[Tensor | None]) -> Given:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "grad"}
        pair = batch_norm_twice(**leaves, relu=relu, counters=counters, backend=runner.backend)
        assert pair[0].data_ptr() == pair[1].data_ptr()
        used = [(one, grad) for one, grad in zip(pair, grads, strict=True) if grad is not None]
        torch.autograd.backward([one for one, _ in used], [grad for _, grad in used])
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    for one, another in ((tensors["grad"], other), (None, other), (tensors["grad"], None)):
        got = taken([one, another])
        tensors["grad"] = sum(grad for grad in (one, another) if grad is not None)  # type: ignore[assignment]
        expected = results(ours(runner.backend), tensors, relu)
        assert not counters.any()
        for name, value in got.items():
            eps = 4 * torch.finfo(runner.dtype).eps
            scale = float(expected[f"grad_{name}"].abs().max())
            torch.testing.assert_close(value, expected[f"grad_{name}"], rtol=eps, atol=eps * scale)
        tensors["grad"] = one if one is not None else other


@on_triton
def test_nothing_is_left_in_counters_and_they_may_be_used_again(runner: Runner) -> None:
    """Of three blocks of channels, for each of which many programs count."""
    tensors = given(runner, (4 if runner.device == "cuda" else 1, 130, 24, 11), True)  # the interpreter takes its time
    expected = results(ours("triton"), tensors, True)
    counters = make_counters(130, runner.device)

    def norm(leaves: Given, relu: bool, mean: Tensor, variance: Tensor) -> Tensor:
        running = RunningMoments(mean, variance, momentum=MOMENTUM)
        return batch_norm(**leaves, relu=relu, running=running, counters=counters, backend="triton")

    for _ in range(3):
        got = results(norm, tensors, True)
        assert not counters.any()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@on_triton
@pytest.mark.parametrize(("shape", "groups"), [((1, 3, 17, 37), 40), ((1, 3, 5, 211), 66)])
def test_more_groups_than_are_added_at_a_time(runner: Runner, shape: tuple[int, ...], groups: int) -> None:
    """32 at a time, and as many under way meanwhile; the last has fewer rows."""
    rows = shape[2] * shape[3]
    assert plan(rows, 3).groups == plan(rows, 3, backward=True).groups == groups and rows % 16
    check(runner, shape, True, True)


@on_triton
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("programs", [1, 2])
def test_a_program_takes_more_tiles_than_are_under_way(runner: Runner, programs: int, joint: bool) -> None:
    tensors = given(runner, (2, 3, 13, 17), True, joint=joint)
    config = BatchNormConfig(16, 4, programs)
    assert plan(442, 3, config).rows_each > 8 * 16

    def norm(leaves: Given, relu: bool, *moments: Tensor) -> Tensor:
        return batch_norm(**options_of(leaves, *moments), relu=relu, config=config, backend="triton")

    expected = results(ours("triton"), tensors, True)
    for name, value in results(norm, tensors, True).items():
        rounding = max(1e-4, torch.finfo(value.dtype).eps)
        torch.testing.assert_close(value, expected[name], rtol=rounding, atol=1e-4)


@on_cuda
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    tensors = given(runner, (32, 64, 56, 56), True)
    first = results(ours("triton"), tensors, True)
    for _ in range(5):
        again = results(ours("triton"), tensors, True)
        assert all(torch.equal(first[name], again[name]) for name in first)


@on_triton
def test_opcheck_and_compile(runner: Runner) -> None:
    tensors = given(runner, (2, 6, 4, 5), True)
    x, weight, bias, residual, grad = (tensors[name] for name in ("x", "weight", "bias", "residual", "grad"))
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    *_, bits = ops.batch_norm_triton(x, residual, weight, bias, None, None, None, None, 0.0, 1e-5, True, True, ())
    counters = make_counters(6, x.device)
    batches = torch.zeros((), dtype=torch.int64, device=x.device)
    for running in ((None, None, None), (mean, variance, batches)):
        for asked in (False, True):
            arguments = (x, residual, weight, bias, *running, counters, 0.1, 1e-5, True, asked, ())
            torch.library.opcheck(ops.batch_norm_triton, arguments)
    for more in (None, grad.clone()):
        arguments = (grad, more, x, bits, weight, bias, mean, variance, counters, 1e-5, True, True, ())
        torch.library.opcheck(ops.batch_norm_backward_triton, arguments)
    with pytest.raises(RuntimeError, match="relu and behind must be asked for where bits are given"):
        ops.batch_norm_backward_triton(*arguments[:-2], False, ())
    with pytest.raises(RuntimeError, match=r"bits must be uint8 \(1, 40, 8\), contiguous"):
        ops.batch_norm_backward_triton(*arguments[:3], bits[1:], *arguments[4:])
    assert not counters.any()
    expected = results(ours("triton"), tensors, True)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(ours("triton"), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for name, value in results(compiled, tensors, True).items():
            assert torch.equal(value, expected[name]), name


@on_cuda
def test_in_a_graph(runner: Runner) -> None:
    tensors = given(runner, (8, 128, 14, 14), True)
    for _ in range(2):
        results(ours("triton"), tensors, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(ours("triton"), tensors, True)
    tensors["x"].copy_(tensors["x"].flip(0).clone())
    graph.replay()
    expected = results(ours("triton"), tensors, True)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rows", [2, 31, 33, 1568, 6272, 25088, 100352, 401408])
@pytest.mark.parametrize("channels", [1, 64, 65, 256, 2048, 40000])
def test_plans_cover_all_rows_once(rows: int, channels: int) -> None:
    for config in (pinned(rows, channels), pinned(rows, channels, backward=True), *CONFIGS):
        found = plan(rows, channels, config)
        assert found.rows_each % found.rows == 0
        assert (found.groups - 1) * found.rows_each < rows <= found.groups * found.rows_each
        assert found.groups == 1 or found.blocks * found.groups <= config.programs


def test_small_layers_have_two_programs_for_each_multiprocessor_backward() -> None:
    """In a step of FastMETRO-S that takes 66 microseconds less than one; forward it takes 18 more."""
    assert plan(6272, 256).groups == 33 and plan(6272, 256, backward=True).groups == 66
    assert plan(401408, 64) == plan(401408, 64, backward=True)


@on_triton
def test_every_tile(runner: Runner) -> None:
    tensors = given(runner, (3, 70, 9, 11), True)
    leaves = [tensors[name] for name in ("x", "weight", "bias")]
    pinned_result = batch_norm(*leaves, residual=tensors["residual"], relu=True, backend="triton")
    for config in CONFIGS:
        got = batch_norm(*leaves, residual=tensors["residual"], relu=True, config=config, backend="triton")
        torch.testing.assert_close(got, pinned_result)


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), (80, "fp16")])
def test_kernels_compile_without_spilling(capability: int, dtype: str) -> None:
    found = compile_report("compile_batch_norm.py", capability, dtype, 256)
    assert {name.split()[0] for name in found} == {
        "moments", "norm", "backward_sums", "backward", "joint", "joint_sums", "joint_backward",
    }  # fmt: skip
    for name, used in found.items():
        few = 0 if capability >= 90 else 8  # bytes, in the smallest tile by the assembler of Triton 3.6
        assert used["stack"] <= few and used["wide"], (name, used)
        assert used["waits"] == (capability >= 90), (name, used)
        # In half precision bits are made of what a lane has: only sums of rows go through shared memory.
        assert bool(used["shared"]) == ("sums" in name or "moments" in name), (name, used)


X, W = torch.zeros(2, 3, 4, 5), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], W, W), {}, ValueError, r"x must be \[B, C, H, W\], got \[3, 4, 5\]"),
        ((X[:1, :, :1, :1], W, W), {}, ValueError, r"at least two values per channel, got \[1, 3, 1, 1\]"),
        ((X[:0], W, W), {}, ValueError, "at least two values per channel"),
        ((X, W[:2], W), {}, ValueError, r"weight must be \[3\], got \[2\]"),
        ((X, W, W.half()), {}, TypeError, "bias"),
        ((X.int(), W, W), {}, TypeError, "x"),
        ((X, W, W), {"residual": X[:1]}, ValueError, r"residual must be \[2, 3, 4, 5\] like x, got \[1, 3, 4, 5\]"),
        ((X, W, W), {"residual": X.half()}, TypeError, "residual"),
        ((X, W, W), {"epsilon": -1.0}, ValueError, "epsilon"),
        ((X, W, W), {"config": (64, 4, 1)}, TypeError, "config must be a BatchNormConfig, got tuple"),
        ((X, W, W), {"config": BatchNormConfig(48, 4)}, ValueError, "rows must be one of 16, 32, 64, 128, 256, got 48"),
        ((X, W, W), {"config": BatchNormConfig(64, 4, 0)}, ValueError, "programs must be at least 1, got 0"),
        ((X, W, W), {"running": (W, W)}, TypeError, "running must be RunningMoments, got tuple"),
        ((X, W, W), {"running": RunningMoments(W, W[:1])}, ValueError, r"running.variance must be \[3\], got \[1\]"),
        ((X, W, W), {"running": RunningMoments(W, W, W)}, TypeError, "running.batches"),
        ((X, W, W), {"running": RunningMoments(W, W, momentum=math.nan)}, ValueError, "momentum must be finite"),
        ((X, W, W), {"counters": W.long()}, TypeError, "counters"),
        ((X, W, W), {"counters": W.int()[:0]}, ValueError, "counters must be at least 1 numbers"),
        ((X, W, W), {"backend": "cudnn"}, ValueError, "backend='cudnn' is not known"),
        ((X.double(), W.double(), W.double()), {"backend": "triton"}, BackendUnavailable, "float64"),
    ],
)  # fmt: skip
def test_refused(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_norm(*arguments, **options)


def test_half_of_a_batch_norm_is_not_half_precision() -> None:
    """The moments of half-precision tensors are float32."""
    x = torch.randn(2, 3, 4, 5).to(HALF)
    _, mean, variance = reference.forward(x, None, W + 1, W, None, None, None, 0.0, 1e-5, False)
    assert mean.dtype == variance.dtype == FLOAT
