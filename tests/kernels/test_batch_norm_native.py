"""The native batch norm on a GPU of compute capability 9.0; its kernels are also in test_batch_norm_emulated.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from fused_cases import BFLOAT, FLOAT, HALF, Runner, poisoned_memory, randn
from test_batch_norm import LARGE, LAST, MOMENTUM, SMALL, Given, check, given, kinds, ours, results
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.backends import hopper_reasons
from fastmetro_kernels.batch_norm import BatchNormConfig, RunningMoments, batch_norm, batch_norm_twice, native
from fastmetro_kernels.batch_norm.native import CONFIGS, NativeConfig, blocks, pinned_native, sweeps, worth_timing

WHY_NOT = hopper_reasons(native.OPERATOR, torch.device("cuda"), HALF) if torch.cuda.is_available() else ["needs a GPU"]
on_hopper = pytest.mark.skipif(bool(WHY_NOT), reason="; ".join(WHY_NOT))
runners = pytest.mark.parametrize("runner", [Runner("cuda", "native", dtype) for dtype in (HALF, BFLOAT)], ids=str)
CUDA = Runner("cuda", "native", HALF)
# What also fills no sweep, no block's channels, not all blocks of a cluster; and large ones.
SHAPES = [(2, 8, 1, 1), (1, 40, 3, 3), (3, 136, 9, 11), *(one for one in SMALL if one[1] % 8 == 0)]


def with_config(config: NativeConfig | None) -> Any:
    def norm(leaves: Given, relu: bool, mean: Tensor, variance: Tensor) -> Tensor:
        running = RunningMoments(mean, variance, momentum=MOMENTUM)
        return batch_norm(**leaves, relu=relu, running=running, config=config, backend="native")

    return norm


@on_hopper
@runners
@kinds
def test_against_float64(runner: Runner, residual: bool, relu: bool) -> None:
    for shape in SHAPES + ([] if residual ^ relu else LARGE):
        check(runner, shape, residual, relu)


@on_hopper
@runners
def test_a_mean_far_from_zero_keeps_digits(runner: Runner) -> None:
    check(runner, (2, 40, 6, 7), False, False, mean=100.0)
    check(runner, (8, 64, 56, 56), False, False, mean=100.0)


@on_hopper
@pytest.mark.parametrize("shape", [(3, 72, 9, 11), (32, 256, 28, 28)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config(config: NativeConfig, shape: tuple[int, ...]) -> None:
    """Sums in another order, and everything written."""
    tensors = given(CUDA, shape, True)
    expected = results(with_config(None), tensors, False)
    with poisoned_memory():
        got = results(with_config(config), tensors, False)
    for name, value in got.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3 * scale)


@on_hopper
@kinds
def test_the_gradients_of_two_takers_are_added(residual: bool, relu: bool) -> None:
    tensors = given(CUDA, (32, 512, 14, 14), residual)
    other = randn(CUDA, 32, 512, 14, 14, seed=5).contiguous(memory_format=LAST)
    leaves = {name: one.detach().requires_grad_() for name, one in tensors.items() if name != "grad"}
    pair = batch_norm_twice(**leaves, relu=relu, backend="native")
    torch.autograd.backward(pair, [tensors["grad"], other])
    tensors["grad"] = tensors["grad"] + other
    expected = results(ours("native"), tensors, relu)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        scale = float(expected[f"grad_{name}"].abs().max())
        torch.testing.assert_close(leaf.grad, expected[f"grad_{name}"], rtol=4e-3, atol=4e-3 * scale)


@on_hopper
def test_what_is_no_number_stays_in_its_channel() -> None:
    tensors = given(CUDA, (8, 72, 13, 15), False)
    expected = results(ours("native"), tensors, True)
    tensors["x"][1, 4, 2, 2] = torch.nan
    got = results(ours("native"), tensors, True)
    kept = torch.tensor([channel for channel in range(72) if channel != 4], device="cuda")
    assert bool(got["out"][:, 4].isnan().all()) and bool(got["mean"][4].isnan()) and bool(got["variance"][4].isnan())
    for name, value in got.items():
        axis = 1 if value.dim() == 4 else 0
        assert torch.equal(value.index_select(axis, kept), expected[name].index_select(axis, kept)), name


@on_hopper
def test_running_averages() -> None:
    tensors = given(CUDA, (2, 72, 30, 50), False)
    module = torch.nn.BatchNorm2d(72, device="cuda")
    mean, variance, batches = (torch.clone(one) for one in module.buffers())
    for _ in range(3):
        module(tensors["x"].float())
        running = RunningMoments(mean, variance, batches)
        batch_norm(tensors["x"], tensors["weight"], tensors["bias"], running=running, backend="native")
        tensors["x"] = tensors["x"] * 1.5 + 1
    for ours_, theirs in zip((mean, variance, batches), module.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)


@on_hopper
@pytest.mark.parametrize("shape", [(32, 512, 7, 7), (32, 2048, 7, 7), (32, 64, 56, 56)], ids=str)
def test_equal_calls_give_equal_bits(shape: tuple[int, ...]) -> None:
    """On two streams, each kernel launched while the one in front of it ends: a race would show."""
    tensors = given(CUDA, shape, True)
    first = results(ours("native"), tensors, True)
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(results(ours("native"), tensors, True))
    torch.cuda.synchronize()
    for again in found:
        assert all(torch.equal(first[name], again[name]) for name in first)


@on_hopper
def test_each_reads_what_the_one_before_has_just_written() -> None:
    tensors = given(CUDA, (32, 256, 14, 14), False)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    expected = [x]
    for _ in range(4):
        expected.append(batch_norm(expected[-1], weight, bias, relu=True, backend="native"))
        torch.cuda.synchronize()
    for _ in range(50):
        chain = [x]
        for _ in range(4):
            chain.append(batch_norm(chain[-1], weight, bias, relu=True, backend="native"))
        assert all(torch.equal(one, other) for one, other in zip(chain, expected, strict=True))
    assert not any(torch.equal(one, other) for one, other in pairwise(expected))


@on_hopper
@pytest.mark.parametrize("shape", [(8, 128, 14, 14), (32, 512, 7, 7)], ids=str)
def test_in_a_graph(shape: tuple[int, ...]) -> None:
    tensors = given(CUDA, shape, True)
    results(ours("native"), tensors, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(ours("native"), tensors, True)
    tensors["x"].copy_(tensors["x"].flip(0).clone())
    graph.replay()
    expected = results(ours("native"), tensors, True)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@on_hopper
def test_opcheck_and_compile() -> None:
    tensors = given(CUDA, (2, 16, 4, 5), True)
    x, weight, bias, residual, grad = (tensors[name] for name in ("x", "weight", "bias", "residual", "grad"))
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    batches = torch.zeros((), dtype=torch.int64, device="cuda")
    config = [8, 2]
    for running in ((None, None, None), (mean, variance, batches)):
        arguments = (x, residual, weight, bias, *running, 0.1, 1e-5, True, config)
        torch.library.opcheck(native.batch_norm_native, arguments)
    out, *_ = native.batch_norm_native(*arguments)
    for more in (None, grad.clone()):
        arguments = (grad, more, x, out, weight, bias, mean, variance, 1e-5, True, True, config)
        torch.library.opcheck(native.batch_norm_backward_native, arguments)
    torch.library.opcheck(native.batch_norm_backward_native, (*arguments[:3], None, *arguments[4:-2], False, config))
    with pytest.raises(RuntimeError, match="behind must be asked for where out is given"):
        native.batch_norm_backward_native(*arguments[:-2], False, config)
    expected = results(ours("native"), tensors, True)
    torch._dynamo.reset()
    compiled = torch.compile(ours("native"), fullgraph=True, backend="aot_eager", dynamic=False)
    for name, value in results(compiled, tensors, True).items():
        assert torch.equal(value, expected[name]), name


@on_hopper
def test_gradients_that_lie_askew_are_copied() -> None:
    tensors = given(CUDA, (2, 16, 4, 5), False)
    expected = results(ours("native"), tensors, True)
    room = torch.zeros(tensors["grad"].numel() + 1, dtype=HALF, device="cuda")
    askew = room[1:].as_strided(tensors["grad"].shape, tensors["grad"].stride(), 1).copy_(tensors["grad"])
    assert askew.data_ptr() % 16
    for name, value in results(ours("native"), tensors | {"grad": askew}, True).items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(BackendUnavailable, match="x must be aligned to 16 bytes"):
        batch_norm(askew, tensors["weight"], tensors["bias"], backend="native")


@on_hopper
def test_more_than_2_31_numbers() -> None:
    """The last rows are as those of a tensor that holds nothing else: all images are the same."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    one = randn(CUDA, 1, 64, 512, 512)
    x = one.expand(130, -1, -1, -1).contiguous(memory_format=LAST)
    assert x.numel() > 2**31
    weight, bias = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    out, mean, variance = native.batch_norm_native(x, None, weight, bias, None, None, None, 0.1, 1e-5, False, [2, 16])
    expected = batch_norm(one, weight, bias, backend="reference")
    for image in (0, 64, 129):
        torch.testing.assert_close(out[image], expected[0], rtol=2e-3, atol=2e-3)
    moments = mean, variance
    grad_x, *sums, _ = native.batch_norm_backward_native(
        out, None, x, None, weight, bias, *moments, 1e-5, False, False, [2, 16]
    )
    count = x.numel() / 64
    torch.testing.assert_close(sums[0] / count, torch.ones_like(bias), rtol=1e-3, atol=1e-3)
    assert float(grad_x[129].abs().max()) < 1e-2  # the gradient of what the norm takes out again


def test_auto_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "reasons", lambda *_: [])
    monkeypatch.setattr(native, "batch_norm_native", lambda *_: pytest.fail("it was taken"))
    batch_norm(torch.randn(2, 8, 3, 3), torch.ones(8), torch.zeros(8))


def test_what_it_cannot_take_is_named() -> None:
    x, w = torch.zeros(2, 12, 4, 5), torch.zeros(12)
    with pytest.raises(BackendUnavailable, match="native: runs on CUDA devices only; takes channels in multiples of 8"):
        batch_norm(x, w, w, backend="native")
    with pytest.raises(ValueError, match="config is of the Triton kernels, and backend is 'native'"):
        batch_norm(x, w, w, config=BatchNormConfig(32, 8), backend="native")
    for backend in ("auto", "triton"):
        with pytest.raises(ValueError, match=f"config is of the native kernels, and backend is '{backend}'"):
            batch_norm(x, w, w, config=NativeConfig(8, 2), backend=backend)
    with pytest.raises(ValueError, match="lanes must be one of 2, 4, 8, got 3"):
        batch_norm(x, w, w, config=NativeConfig(3, 2), backend="native")
    with pytest.raises(ValueError, match="cluster must be one of 1, 2, 4, 8, 16, got 32"):
        batch_norm(x, w, w, config=NativeConfig(8, 32), backend="native")


def test_shapes_are_known_without_a_gpu() -> None:
    """The ops' fake implementations, through both passes."""
    with torch.device("meta"):
        x = torch.empty(2, 16, 4, 5, dtype=BFLOAT).contiguous(memory_format=LAST)
        w, batches = torch.empty(16, dtype=FLOAT), torch.empty((), dtype=torch.int64)
    out, mean, variance = native.batch_norm_native(x, x, w, w, w, w, batches, 0.1, 1e-5, True, [8, 2])
    assert out.shape == x.shape and out.is_contiguous(memory_format=LAST) and mean.shape == variance.shape == (16,)
    for behind in (True, False):
        kept = out if behind else None
        found = native.batch_norm_backward_native(out, x, x, kept, w, w, w, w, 1e-5, True, behind, [2, 16])
        assert [one.dtype for one in found] == [BFLOAT, FLOAT, FLOAT, BFLOAT]
        assert found[3].numel() == (x.numel() if behind else 0)
    for wrong, message in (([8], "config: two numbers"), ([8, 3], "config: cluster must be one of 1, 2, 4, 8, 16")):
        with pytest.raises(RuntimeError, match=message):
            native.batch_norm_native(x, None, w, w, None, None, None, 0.1, 1e-5, True, wrong)


@pytest.mark.parametrize("rows", [2, 31, 1568, 25088, 401408])
@pytest.mark.parametrize("channels", [8, 64, 72, 256, 2048, 40000])
def test_the_pinned_config_fills_a_gpu_and_no_more(rows: int, channels: int) -> None:
    found = pinned_native(rows, channels)
    assert found in CONFIGS and native.problem(found) is None
    assert blocks(channels, found) <= 264 or found == NativeConfig(8, 1)
    assert sweeps(rows, found) * found.cluster * (256 // found.lanes) >= rows
    assert found in worth_timing(rows, channels) or blocks(channels, found) > 264 or rows < 1000


def test_pinned_configs_of_a_network() -> None:
    """As many blocks as multiprocessors, nearly, and whole cache lines where that is possible."""
    found = {(rows, channels): pinned_native(rows, channels) for rows, channels in (
        (1568, 2048), (1568, 512), (6272, 1024), (6272, 256), (25088, 128),
    )}  # fmt: skip
    assert [tuple(one) for one in found.values()] == [(8, 4), (8, 16), (8, 8), (4, 16), (2, 16)]
    assert all(blocks(channels, one) == 128 for (_, channels), one in found.items())
