"""residual_norm: its dropout and seeds, how it compiles and is captured, its tiles and kernels, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compilation import compile_report, needs_triton
from fused_cases import FLOAT, HALF, Runner, on_cuda, on_each_backend, on_triton
from residual_norm_cases import SEED, P, factors, given, operands, ours, plain, results
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.residual_norm import ResidualNormConfig, final_residual_norm, ops, residual_norm
from fastmetro_kernels.residual_norm.plan import CONFIGS, WIDEST, pinned
from fastmetro_kernels.residual_norm.plan import plan as share_out


@on_triton
def test_both_backends_drop_the_same(runner: Runner) -> None:
    """Forward and backward: the gradient of the branch is 0 where it was dropped, and only there."""
    for shape in ((37, 20), (3, 5, 129), (64, 64)):
        tensors = given(runner, shape, shape)
        for p in (1e-9, 0.1, 0.5, 0.9999999):
            mask = factors(tensors, p)
            got = results(lambda leaves: ours(leaves, runner, p), tensors)  # noqa: B023
            assert torch.equal(got["grad_branch"] == 0, mask == 0)
            dropped = mask == 0
            stream = tensors["stream"].expand(shape)
            assert torch.equal(got["new_stream"][dropped], stream[dropped])
            if p < 0.9:
                assert bool((got["new_stream"][~dropped] != stream[~dropped]).float().mean() > 0.95)


@on_each_backend
def test_seeds(runner: Runner) -> None:
    """The same of a number and of a tensor with it; none draws from PyTorch's generator."""
    tensors = given(runner, (8, 40), (8, 40))
    named = operands(tensors)

    def run(seed: Any, p: float = 0.5) -> Tensor:
        return residual_norm(**named, dropout_p=p, seed=seed, backend=runner.backend)[0]

    tensor = torch.tensor(-5, device=runner.device)
    assert torch.equal(run(-5), run(tensor)) and torch.equal(run(-5), run(tensor.view(1, 1)))
    assert not torch.equal(run(-5), run(-5 + 2**40)) and not torch.equal(run(-5), run(-4))
    torch.manual_seed(3)
    first, second = run(None), run(None)
    torch.manual_seed(3)
    assert torch.equal(run(None), first) and not torch.equal(first, second)
    whole = tensors["stream"].double() + tensors["branch"].double() + tensors["branch_bias"].double()
    torch.testing.assert_close(run(None, 0.0), whole.to(tensors["stream"].dtype))


@on_cuda
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    tensors = given(runner, (32, 445, 512), (1, 445, 512))
    first = results(lambda leaves: ours(leaves, runner), tensors)
    for _ in range(5):
        again = results(lambda leaves: ours(leaves, runner), tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


@on_triton
def test_every_tile(runner: Runner) -> None:
    tensors = given(runner, (3, 5, 70), (1, 5, 70))
    expected = results(lambda leaves: ours(leaves, runner), tensors)
    for config in (
        *CONFIGS[::7],
        ResidualNormConfig(4, 4, 1),
        ResidualNormConfig(2, 1, 3),
        ResidualNormConfig(64, 4, 9),
    ):
        got = results(lambda leaves: ours(leaves, runner, config=config), tensors)  # noqa: B023
        eps = 16 * torch.finfo(runner.dtype).eps
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=eps, atol=eps * float(expected[name].abs().max()))


@on_triton
def test_more_programs_than_are_joined_at_a_time(runner: Runner) -> None:
    """And a stream that begins again in the midst of a program's rows."""
    from fastmetro_kernels.column_sums import PARTS

    tensors = given(runner, (3, PARTS // 3 + 5, 9), (1, PARTS // 3 + 5, 9))
    got = results(lambda leaves: ours(leaves, runner, config=ResidualNormConfig(1, 1, 2 * PARTS)), tensors)
    mask = factors(tensors, P)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    for name, value in results(lambda leaves: plain(leaves, mask), doubles).items():
        eps = 64 * torch.finfo(runner.dtype).eps
        torch.testing.assert_close(got[name].double(), value, rtol=eps, atol=eps * float(value.abs().max()))


@on_triton
def test_opcheck(runner: Runner) -> None:
    tensors = given(runner, (3, 5, 24), (1, 5, 24))
    stream, branch, weight, bias = (tensors[name] for name in ("stream", "branch", "weight", "bias"))
    seed = torch.tensor([3], device=stream.device)
    for more, extra, dropped in (
        (branch, tensors["branch_bias"], seed), (branch, None, seed), (branch, bias, None), (None, None, None),
    ):  # fmt: skip
        arguments = (stream, more, weight, bias, extra, dropped, 0.1, 1e-5, runner.dtype, ())
        torch.library.opcheck(ops.residual_norm_triton, arguments)
    new, _, mean, inverse = ops.residual_norm_triton(
        stream, branch, weight, bias, None, seed, 0.1, 1e-5, runner.dtype, ()
    )
    for grad, other, dropped, dtype, biased in (
        (tensors["grad"], tensors["more"], seed, runner.dtype, True),
        (None, tensors["more"], seed, runner.dtype, False),
        (tensors["grad"], None, None, None, True), (tensors["grad"], None, None, HALF, False),
        (None, tensors["more"], None, None, True),
    ):  # fmt: skip
        arguments = (grad, other, new, weight, mean, inverse, dropped, 0.1, runner.dtype, dtype, biased, ())
        torch.library.opcheck(ops.residual_norm_backward_triton, arguments)


@on_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(runner: Runner, dynamic: bool) -> None:
    def both(stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor) -> Tensor:
        options: Any = {"dropout_p": P, "seed": SEED, "backend": "triton"}
        new, normed = residual_norm(stream * 2, branch, weight, bias, branch_bias=branch_bias, **options)
        alone = final_residual_norm(new, normed, weight, bias, **options)
        return new.sum() + (normed * alone).sum() + residual_norm(stream, None, weight, bias, backend="triton")[1].sum()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (3, 5):
        tensors = given(runner, (2, size, 12), (1, size, 12))
        leaves = [one.requires_grad_() for one in operands(tensors).values()]
        expected, got = both(*leaves), compiled(*leaves)
        eps = 64 * torch.finfo(runner.dtype).eps
        torch.testing.assert_close(got, expected, rtol=eps, atol=eps)
        for one, same in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(one, same, rtol=eps, atol=eps * float(same.abs().max()))


@on_cuda
def test_in_a_graph(runner: Runner) -> None:
    """Also with a seed that is drawn in the graph: another one in each replay."""
    tensors = given(runner, (64, 128), (64, 128))
    named = operands(tensors)
    for _ in range(2):
        results(lambda leaves: ours(leaves, runner), tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(lambda leaves: ours(leaves, runner), tensors)
        drawn = residual_norm(**named, dropout_p=0.5, backend="triton")[0]
    tensors["stream"].copy_(tensors["stream"].flip(0).clone())
    graph.replay()
    expected = results(lambda leaves: ours(leaves, runner), tensors)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)
    before = drawn.clone()
    graph.replay()
    assert not torch.equal(before, drawn)


@pytest.mark.parametrize("rows", [1, 3, 527, 1600, 14240, 1_000_003])
@pytest.mark.parametrize("width", [1, 64, 65, 128, 512, 1024, 1025, WIDEST])
def test_plans_cover_all_rows_once(rows: int, width: int) -> None:
    for backward in (False, True):
        for config in (pinned(width, backward), *CONFIGS):
            found = share_out(rows, width, backward, config)
            assert width <= found.block < max(2 * width, 9) and found.rows_each % found.rows == 0
            assert (found.groups - 1) * found.rows_each < rows <= found.groups * found.rows_each
            assert found.groups <= config.programs


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), (80, "fp16")])
@pytest.mark.parametrize("width", [512, 128])
def test_kernels_compile_without_spilling(capability: int, dtype: str, width: int) -> None:
    """16 bytes at a time, a call of random numbers for eight elements, and all programs at once on a multiprocessor."""
    found = compile_report("compile_residual_norm.py", capability, dtype, width)
    assert len(found) == 16 + 3 + 4
    for name, used in found.items():
        assert used["stack"] == 0 and used["waits"] == (capability >= 90), (name, used)
        kernel = name.split()[0]
        assert used["ld 16"] and (used.get("st 16") or kernel == "join"), (name, used)
        assert not ({"ld 2", "st 2"} & used.keys()), (name, used)
        most = {"forward": 96, "backward": 128, "join": 64}.get(kernel, 64)
        assert used["registers"] <= most, (name, used)
        calls = {"forward": 2, "backward": 1, "relu": 4, "relu_biased": 2}.get(kernel, 0)
        assert used["mul_hi"] <= 20 * calls + 2, (name, used)


X, W = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X[:1], W, W), {}, ValueError, r"stream must be \[1, 3, 4\] like branch, or \[1, 3, 4\] for all samples"),
        ((X[:, :1], X, W, W), {}, ValueError, r"stream must be \[2, 3, 4\] like branch, .* got \[2, 1, 4\]"),
        ((X[..., :0], None, W, W), {}, ValueError, r"stream must be \[..., C\] with C >= 1, got \[2, 3, 0\]"),
        ((X[0, 0, 0], None, W, W), {}, ValueError, r"stream must be \[..., C\]"),
        ((X, X, W[:2], W), {}, ValueError, r"weight must be \[4\], got \[2\]"),
        ((X, X, W, W.half()), {}, TypeError, "bias must be one of float32, got torch.float16"),
        ((X.double(), X, W, W), {}, TypeError, "weight must be one of float64"),
        ((X.int(), X, W, W), {}, TypeError, "stream"),
        ((X, X.int(), W, W), {}, TypeError, "branch"),
        ((None, X, W, W), {}, TypeError, "stream must be a tensor, got NoneType"),
        ((X, X.to("meta"), W, W), {}, ValueError, "branch must be on cpu, got meta"),
        ((X, X, W, W), {"branch_bias": W[:2]}, ValueError, r"branch_bias must be \[4\], got \[2\]"),
        ((X, X, W, W), {"branch_bias": W.half()}, TypeError, "branch_bias must be one of float32, got torch.float16"),
        ((X, X, W, W), {"branch_bias": W.to("meta")}, ValueError, "branch_bias must be on cpu, got meta"),
        ((X, X, W, W), {"branch_bias": 1.0}, TypeError, "branch_bias must be a tensor, got float"),
        ((X, None, W, W), {"branch_bias": W}, ValueError, "branch_bias must be None without a branch"),
        ((X, X, W, W), {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((X, X, W, W), {"dropout_p": math.nan}, ValueError, "dropout_p must be in"),
        ((X, X, W, W), {"dropout_p": True}, TypeError, "dropout_p must be a float, got bool"),
        ((X, X, W, W), {"seed": 2**63}, ValueError, "seed must fit 64 bits"),
        ((X, X, W, W), {"seed": 1.5}, TypeError, "seed must be an int, an int64 tensor or None, got float"),
        ((X, X, W, W), {"seed": W}, TypeError, "seed must be int64"),
        ((X, X, W, W), {"seed": W.long()}, ValueError, "seed must have one element"),
        ((X, X, W, W), {"seed": W[:1].long().to("meta")}, ValueError, "seed must be on cpu, got meta"),
        ((X, X, W, W), {"epsilon": -1.0}, ValueError, "epsilon"),
        ((X, X, W, W), {"dtype": torch.int32}, TypeError, "dtype must be a floating point dtype or None"),
        ((X, X, W, W), {"config": (4, 4, 1)}, TypeError, "config must be a ResidualNormConfig, got tuple"),
        ((X, X, W, W), {"config": ResidualNormConfig(3, 4, 1)}, ValueError, "rows must be one of 1, 2, 4, .*, got 3"),
        ((X, X, W, W), {"config": ResidualNormConfig(4, 3, 1)}, ValueError, "warps must be one of"),
        ((X, X, W, W), {"config": ResidualNormConfig(4, 4, 0)}, ValueError, "programs must be at least 1, got 0"),
        ((X, X, W, W), {"backend": "cudnn"}, ValueError, "backend='cudnn' is not known"),
        ((X.double(), X, W.double(), W.double()), {"backend": "triton"}, BackendUnavailable, "float64"),
    ],
)  # fmt: skip
def test_refused(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    for op in (residual_norm, final_residual_norm):
        with pytest.raises(error, match=message):
            op(*arguments, **options)


@on_triton
def test_rows_that_are_too_wide(runner: Runner) -> None:
    x, w = (torch.zeros(size, device=runner.device) for size in ((1, WIDEST + 1), (WIDEST + 1,)))
    with pytest.raises(BackendUnavailable, match=f"rows of at most {WIDEST}, got {WIDEST + 1}"):
        residual_norm(x, x, w, w, backend="triton")
    assert residual_norm(x, x, w, w)[1].shape == x.shape


@on_triton
def test_the_ops_refuse_what_does_not_fit(runner: Runner) -> None:
    x, w = torch.zeros(2, 3, 4, device=runner.device), torch.zeros(4, device=runner.device)
    rows, seed = x[..., 0].contiguous(), torch.zeros(1, dtype=torch.int64, device=runner.device)
    forward: tuple[Any, ...] = (x, x, w, w, w, seed, 0.1, 1e-5, FLOAT, ())
    backward: tuple[Any, ...] = (x, x, x, w, rows, rows, seed, 0.1, FLOAT, FLOAT, True, ())
    for op, arguments, place, wrong, message in (
        (ops.residual_norm_triton, forward, 0, x.transpose(0, 1), "stream must be contiguous"),
        (ops.residual_norm_triton, forward, 0, x[:, :1].contiguous(), "stream must be"),
        (ops.residual_norm_triton, forward, 3, w[:2], "bias must be float32"),
        (ops.residual_norm_triton, forward, 1, None, "branch_bias must come with a branch"),
        (ops.residual_norm_triton, forward, 4, w[:2], "branch_bias must be float32"),
        (ops.residual_norm_triton, forward, 5, seed.int(), "seed must be one int64"),
        (ops.residual_norm_triton, forward, 9, (1, 2), "three numbers"),
        (ops.residual_norm_backward_triton, backward, 1, x[:1], "more must be"),
        (ops.residual_norm_backward_triton, backward, 4, rows[:1], "mean must be float32"),
        (ops.residual_norm_backward_triton, (None, *backward[1:]), 1, None, "grad or more must be given"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments[:place], wrong, *arguments[place + 1 :])
