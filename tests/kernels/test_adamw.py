"""AdamW, clipping and the norm of gradients against float64 on every backend and device; what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from compilation import compile_report, needs_triton
from fused_cases import BFLOAT, DOUBLE, FLOAT, HALF, RUNNERS, Runner
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.adamw import AdamWConfig, AdamWGroup, Tables, adamw, gradient_norm, plan, same_layout
from fastmetro_kernels.adamw.plan import CONFIGS, PINNED, SHIFT

_ONE_EACH = [runner for runner in RUNNERS if runner.dtype == FLOAT]
on_each = pytest.mark.parametrize("runner", _ONE_EACH, ids=str)
on_triton = pytest.mark.parametrize("runner", [one for one in _ONE_EACH if one.backend == "triton"], ids=str)
on_cuda = pytest.mark.parametrize("runner", [one for one in _ONE_EACH if one.device == "cuda"], ids=str)
LAST = torch.channels_last
# One number, odd sizes, whole chunks, some numbers more, several chunks.
SHAPES: list[tuple[int, ...]] = [(1,), (3, 5), (), (64,), (4096,), (4099,), (3, 64, 7, 7), (1024, 9), (16, 8, 1, 1)]
TYPES = (FLOAT, BFLOAT, HALF)
HYPER: dict[str, Any] = {"rate": 0.01, "betas": (0.9, 0.98), "epsilon": 1e-8, "weight_decay": 0.05}


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = FLOAT) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)), dtype=DOUBLE)
    drawn = drawn.to(device, dtype)
    return drawn.contiguous(memory_format=LAST) if len(shape) == 4 else drawn


def group_of(parameters: Sequence[Tensor], gradients: Sequence[Tensor], **options: Any) -> AdamWGroup:
    """Fresh moments; a rate becomes a tensor."""
    moments = [[torch.zeros_like(one) for one in parameters] for _ in range(2)]
    steps = [torch.zeros((), device=one.device) for one in parameters]
    given = HYPER | options
    if parameters and isinstance(given["rate"], float):
        given["rate"] = torch.tensor(given["rate"], device=parameters[0].device)
    return AdamWGroup(list(parameters), list(gradients), *moments, steps, **given)


def example(runner: Runner, shapes: Sequence[tuple[int, ...]] = SHAPES, **options: Any) -> AdamWGroup:
    """Parameters of these shapes, whose gradients have one type after the other."""
    parameters = [randn(*shape, seed=number, device=runner.device) for number, shape in enumerate(shapes)]
    return group_of(parameters, gradients(runner, shapes, 0), **options)


def gradients(runner: Runner, shapes: Sequence[tuple[int, ...]], step: int) -> list[Tensor]:
    types = [TYPES[number % 3] for number in range(len(shapes))]
    drawn = zip(shapes, types, strict=True)
    return [
        0.1 * randn(*shape, seed=100 * step + number + 50, device=runner.device).to(dtype)
        for number, (shape, dtype) in enumerate(drawn)
    ]


class Exact:
    """AdamW after algorithm 2 of Loshchilov and Hutter, in float64."""

    def __init__(self, groups: Sequence[AdamWGroup]) -> None:
        self.groups = groups
        self.parameters = [one.double().clone() for group in groups for one in group.parameters]
        self.first = [torch.zeros_like(one) for one in self.parameters]
        self.second = [torch.zeros_like(one) for one in self.parameters]
        self.steps = 0

    def step(self, found: Sequence[Tensor], max_norm: float | None) -> float:
        doubles = [one.double() for one in found]
        norm = math.sqrt(sum(float(one.square().sum()) for one in doubles))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        self.steps += 1
        owners = [group for group in self.groups for _ in group.parameters]
        for p, m, v, g, group in zip(self.parameters, self.first, self.second, doubles, owners, strict=True):
            (one, two), rate = group.betas, float(group.rate)
            m.mul_(one).add_((1 - one) * scale * g)
            v.mul_(two).add_((1 - two) * (scale * g).square())
            left, right = 1 - one**self.steps, 1 - two**self.steps
            p.sub_(rate * (m / left / ((v / right).sqrt() + group.epsilon) + group.weight_decay * p))
        return norm


class Plain:
    """The same with PyTorch's optimizer and clipping, in float32."""

    def __init__(self, groups: Sequence[AdamWGroup]) -> None:
        self.parameters = [one.clone() for group in groups for one in group.parameters]
        rest = iter(self.parameters)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [next(rest) for _ in group.parameters], "lr": float(group.rate), "betas": group.betas,
                 "eps": group.epsilon, "weight_decay": group.weight_decay}
                for group in groups
            ]
        )  # fmt: skip

    def step(self, found: Sequence[Tensor], max_norm: float | None) -> float:
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient.to(parameter.dtype).clone()
        norm = torch.nn.utils.get_total_norm([one.grad for one in self.parameters if one.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.optimizer.step()
        return float(norm)

    def moments(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[one][name] for one in self.parameters]


def assert_near(got: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], what: str) -> None:
    """No tensor further from float64 than twice PyTorch's float32 result of all tensors is, and a few roundings."""
    budget = 2 * max(float((near.double() - true).abs().max()) for near, true in zip(plain, exact, strict=True))
    for number, (found, true) in enumerate(zip(got, exact, strict=True)):
        allowed = budget + 4 * torch.finfo(FLOAT).eps * true.abs()
        error = (found.double() - true).abs()
        assert bool((error <= allowed).all()), f"{what} {number}: {float(error.max()):.3g}, budget {budget:.3g}"


def put(group: AdamWGroup, found: Sequence[Tensor]) -> None:
    for mine, new in zip(group.gradients, found, strict=True):
        mine.copy_(new)


def check(runner: Runner, groups: Sequence[AdamWGroup], draw: Callable[[int], list[Tensor]],
          max_norm: float | None, steps: int = 4) -> None:  # fmt: skip
    """Several steps with other gradients."""
    exact, plain, tables = Exact(groups), Plain(groups), Tables()
    for step in range(steps):
        found = draw(step)
        begin = 0
        for group in groups:
            put(group, found[begin : begin + len(group.parameters)])
            begin += len(group.parameters)
        norm = adamw(groups, max_norm=max_norm, tables=tables, backend=runner.backend)
        true, near = exact.step(found, max_norm), plain.step(found, max_norm)
        assert (norm is None) == (max_norm is None)
        if norm is not None:
            assert norm.dtype == FLOAT and abs(float(norm) - true) <= 2 * abs(near - true) + 4e-7 * true
    mine = [[one for group in groups for one in getattr(group, name)]
            for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps")]  # fmt: skip
    assert_near(mine[0], exact.parameters, plain.parameters, "parameter")
    assert_near(mine[1], exact.first, plain.moments("exp_avg"), "first moment")
    assert_near(mine[2], exact.second, plain.moments("exp_avg_sq"), "second moment")
    assert all(float(one) == steps for one in mine[3])


@on_each
@pytest.mark.parametrize("max_norm", [None, 0.3, 1, 1e4, math.inf, 0])
def test_against_float64(runner: Runner, max_norm: float | None) -> None:
    check(runner, [example(runner)], lambda step: gradients(runner, SHAPES, step), max_norm)


@on_each
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_groups_have_numbers_of_their_own(runner: Runner) -> None:
    """A rate that is a tensor and one that is not; no decay; the last group has no parameters."""
    first = example(runner, SHAPES[:4], weight_decay=0.5, rate=0.05)
    second = example(runner, SHAPES[4:6], weight_decay=0.0, betas=(0.0, 0.9), epsilon=1e-3)._replace(rate=0.002)
    empty = group_of([], [])
    draw = lambda step: gradients(runner, SHAPES[:4], step) + gradients(runner, SHAPES[4:6], step)  # noqa: E731
    check(runner, [first, second, empty], draw, 0.5)


@on_each
def test_the_reference_is_pytorchs_own_step(runner: Runner) -> None:
    """To the bit, for float32 gradients."""
    if runner.backend != "reference":
        pytest.skip("the reference alone")
    parameters = [randn(*shape, seed=1, device=runner.device) for shape in SHAPES]
    theirs = [one.clone() for one in parameters]
    mine = group_of(parameters, [torch.zeros_like(one) for one in parameters])
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in range(3):
        for number, (one, gradient) in enumerate(zip(theirs, mine.gradients, strict=True)):
            gradient.copy_(randn(*one.shape, seed=30 * step + number))
            one.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        assert adamw([mine], max_norm=1.0, backend="reference") == norm
    assert all(torch.equal(a, b) for a, b in zip(parameters, theirs, strict=True))


@on_each
def test_norms(runner: Runner) -> None:
    """Of odd sizes, of large and small numbers, of views with holes."""
    found = gradients(runner, SHAPES, 3)
    found += [randn(70, 90, seed=5, device=runner.device)[3:, 1::2], 1e-12 * randn(33, device=runner.device)]
    found += [1e3 * randn(6000, seed=6, device=runner.device) + 1e3]
    norm = gradient_norm(found, backend=runner.backend)
    exact = math.sqrt(sum(float(one.double().square().sum()) for one in found))
    assert norm.dtype == FLOAT and norm.shape == () and float(norm) == pytest.approx(exact, rel=3e-7)
    assert float(norm) == pytest.approx(float(torch.nn.utils.get_total_norm([one.float() for one in found])), rel=3e-7)
    zeros = [torch.zeros(5, device=runner.device), torch.zeros(0, device=runner.device)]
    assert float(gradient_norm(zeros, backend=runner.backend)) == 0.0
    assert float(gradient_norm(zeros[1:], backend=runner.backend)) == 0.0


def test_nothing_at_all() -> None:
    assert float(gradient_norm([])) == 0.0
    for groups in ([], [group_of([], [])]):
        assert adamw(groups) is None
        norm = adamw(groups, max_norm=1.0)
        assert norm is not None and float(norm) == 0.0


@on_each
def test_tensors_without_numbers(runner: Runner) -> None:
    """They count their steps."""
    one, other = example(runner, [(0,), (5,), (0, 3)]), example(runner, [(5,)])
    put(other, [one.gradients[1].to(FLOAT)])
    norms = [adamw([group], max_norm=0.1, backend=runner.backend) for group in (one, other)]
    assert torch.allclose(norms[0], norms[1]) and [float(step) for step in one.steps] == [1.0, 1.0, 1.0]  # type: ignore[arg-type]
    alone = example(runner, [(0,)])
    assert float(adamw([alone], max_norm=0.1, backend=runner.backend)) == 0.0 and float(alone.steps[0]) == 1.0  # type: ignore[arg-type]


@on_each
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_views_that_begin_anywhere(runner: Runner, offset: int) -> None:
    """Every tensor in turn lies off the 16 bytes that others lie at; what is around it stays."""
    for moved in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "halves"):
        usual = example(runner, [(2048,), (1000,)])
        usual = usual._replace(
            gradients=[0.1 * randn(*one.shape, seed=9, device=runner.device) for one in usual.parameters],
            halves=[torch.zeros_like(one, dtype=BFLOAT) for one in usual.parameters],
        )
        rooms, views = [], []
        for tensor in getattr(usual, moved):
            room = torch.full((tensor.numel() + 2 * offset + 8,), 77.0, dtype=tensor.dtype, device=tensor.device)
            rooms.append(room)
            views.append(room[offset : offset + tensor.numel()].copy_(tensor))
        copied = usual._replace(**{
            name: [tensor.clone() for tensor in getattr(usual, name)]
            for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "halves", "steps") if name != moved
        })  # fmt: skip
        copied = copied._replace(**{moved: views})
        for group in (usual, copied):
            for _ in range(2):
                adamw([group], max_norm=1.0, backend=runner.backend)
        for name in ("parameters", "exp_avgs", "exp_avg_sqs", "halves"):
            for one, same in zip(getattr(usual, name), getattr(copied, name), strict=True):
                torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-7, msg=f"{moved} moved: {name}")
        for room, view in zip(rooms, views, strict=True):
            around = torch.cat([room[:offset], room[offset + view.numel() :]])
            assert bool((around == 77.0).all()), moved


@on_each
def test_strides(runner: Runner) -> None:
    """A gradient with other strides than its parameter's is that gradient; any dense order of axes will do."""
    for shape in ((8, 6, 3, 3), (6, 5, 4), (16, 8, 1, 1)):
        drawn, gradient = randn(*shape, device=runner.device), randn(*shape, seed=4, device=runner.device)
        order = tuple(reversed(range(len(shape))))
        others = [drawn.contiguous(), drawn.permute(order).contiguous().permute(order)]
        expected = group_of([drawn.clone()], [gradient])
        adamw([expected], max_norm=0.5, backend=runner.backend)
        for other in others:
            got = group_of([other], [gradient.contiguous()])
            before = got.gradients[0].clone()
            adamw([got], max_norm=0.5, backend=runner.backend)
            torch.testing.assert_close(got.parameters[0], expected.parameters[0], rtol=1e-6, atol=1e-7)
            assert torch.equal(got.gradients[0], before)


def test_layouts_are_compared_where_strides_mean_something() -> None:
    x = torch.zeros(16, 8, 1, 1)
    assert (
        same_layout(x, x.contiguous(memory_format=LAST))
        and same_layout(x, torch.zeros(8, 16, 1, 1).transpose(0, 1)) is False
    )
    y = torch.zeros(16, 8, 3, 3)
    assert not same_layout(y, y.contiguous(memory_format=LAST)) and not same_layout(x, y)
    assert same_layout(torch.zeros(0, 3), torch.zeros(3, 0).T) is True


@on_each
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_copies_in_half_precision(runner: Runner, dtype: torch.dtype) -> None:
    group = example(runner)
    halves = [torch.zeros_like(one, dtype=dtype) if number % 2 == 0 else None
              for number, one in enumerate(group.parameters)]  # fmt: skip
    group = group._replace(halves=halves)
    adamw([group], backend=runner.backend)
    for parameter, half in zip(group.parameters, halves, strict=True):
        if half is None:
            continue
        expected = parameter.to(dtype)
        if runner.interpreted and dtype == BFLOAT:  # the interpreter cuts off instead of rounding
            torch.testing.assert_close(half.float(), expected.float(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(half, expected)
    assert same_layout(halves[6], group.parameters[6])  # type: ignore[arg-type]


@on_each
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [None, 1.0, math.inf])
def test_what_is_not_finite_spreads_as_in_pytorch(runner: Runner, value: float, max_norm: float | None) -> None:
    group = example(runner, [(40,), (70,)])
    group = group._replace(gradients=[one.float() for one in group.gradients])
    group.gradients[0][7] = value
    plain = Plain([group])
    near = plain.step(group.gradients, max_norm)
    norm = adamw([group], max_norm=max_norm, backend=runner.backend)
    if norm is not None:
        torch.testing.assert_close(float(norm), near, equal_nan=True)
    for mine, theirs in (
        (group.parameters, plain.parameters),
        (group.exp_avgs, plain.moments("exp_avg")),
        (group.exp_avg_sqs, plain.moments("exp_avg_sq")),
    ):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isfinite(), other.isfinite())


@on_triton
def test_equal_calls_give_equal_bits(runner: Runner) -> None:
    results = []
    for _ in range(2 if runner.interpreted else 8):
        group = example(runner, [*SHAPES, *([] if runner.interpreted else [(2048, 1024), (1000, 999)])])
        tables = Tables()
        norms = [adamw([group], max_norm=0.2, tables=tables, backend="triton") for _ in range(3)]
        results.append([*norms, *group.parameters, *group.exp_avgs, *group.exp_avg_sqs])
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))  # type: ignore[arg-type]


@on_triton
def test_three_launches_for_any_number_of_tensors(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmetro_kernels.adamw import triton

    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    names = ["adamw_norm_kernel", "adamw_factors_kernel", "adamw_update_kernel"]
    for name in names:
        monkeypatch.setattr(triton, name, Counted(name))
    groups = [example(runner, [(3,)] * 70), example(runner, [(5000,)] * 3)]
    adamw(groups, max_norm=1.0, backend="triton")
    assert launched == names
    launched.clear()
    adamw(groups, backend="triton")
    assert launched == names[1:]
    launched.clear()
    gradient_norm(groups[0].gradients, backend="triton")
    assert launched == names[:2]


@on_triton
def test_more_tensors_and_chunks_than_are_taken_at_a_time(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmetro_kernels.adamw import triton

    for name in ("PARTS", "TENSORS"):
        monkeypatch.setattr(triton, name, 16)
    shapes = [(1 + number % 5,) for number in range(37)]
    check(runner, [example(runner, shapes)], lambda step: gradients(runner, shapes, step), 0.5, steps=2)


@on_triton
@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: "x".join(map(str, one)))
def test_every_tile(runner: Runner, config: AdamWConfig) -> None:
    expected, got = (example(runner) for _ in range(2))
    norms = [adamw([expected], max_norm=0.2, backend="triton"),
             adamw([got], max_norm=0.2, config=config, backend="triton")]  # fmt: skip
    torch.testing.assert_close(norms[1], norms[0])
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    torch.testing.assert_close(gradient_norm(got.gradients, config=config, backend="triton"), norms[0])


@on_triton
def test_beyond_2_to_the_31(runner: Runner) -> None:
    """A chunk that begins there: of a table that claims such a tensor, whose last numbers alone are in memory."""
    from fastmetro_kernels.adamw import triton

    behind = randn(5, seed=2, device=runner.device)
    size = 2**31 + 3 * PINNED.chunk + 5
    rows = [[behind.data_ptr() - 4 * (size - 5)], [0], [size]]
    table = torch.tensor(rows, dtype=torch.int64, device=runner.device)
    chunks = torch.from_numpy(plan.chunks([size], PINNED.chunk))[-1:].to(runner.device)
    partials = torch.zeros(1, device=runner.device)
    triton.adamw_norm_kernel[(1,)](
        chunks, table, partials, 1, SHIFT=SHIFT, CHUNK=PINNED.chunk, BLOCK=PINNED.block, EARLY=False,
        num_warps=PINNED.warps,
    )  # fmt: skip
    torch.testing.assert_close(partials, behind.square().sum()[None])


@on_cuda
def test_a_large_tensor(runner: Runner) -> None:
    """More than 2^31 numbers, of which the last few are not 0."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    gradient = torch.zeros(2**31 + 4099, dtype=BFLOAT, device="cuda")
    gradient[-3:] = torch.tensor([3.0, 4.0, 12.0])
    assert float(gradient_norm([gradient], backend=runner.backend)) == 13.0


@pytest.mark.parametrize("sizes", [[], [0], [1], [4096, 0, 4097, 1], [3 * 4096], [2**31 + 5, 7]])
def test_chunks_cover_every_number_once(sizes: list[int]) -> None:
    found = plan.chunks(sizes, 4096)
    tensors, numbers = found >> SHIFT, found & ((1 << SHIFT) - 1)
    for tensor, size in enumerate(sizes):
        own = numbers[tensors == tensor]
        assert np.array_equal(own, np.arange(-(-size // 4096)))
    assert found.dtype == np.int64 and np.array_equal(tensors, np.sort(tensors))


@on_each
def test_versions_tell_of_an_update(runner: Runner) -> None:
    group = example(runner, [(5,), (4, 3)])
    group = group._replace(halves=[torch.zeros_like(one, dtype=HALF) for one in group.parameters])
    lists = (group.parameters, group.exp_avgs, group.exp_avg_sqs, group.steps, group.halves)
    before = [[one._version for one in tensors] for tensors in lists]  # type: ignore[union-attr]
    adamw([group], max_norm=1.0, backend=runner.backend)
    after = [[one._version for one in tensors] for tensors in lists]  # type: ignore[union-attr]
    assert all(b > a for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    assert all(one._version == 0 for one in gradients(runner, [(5,)], 0))


@on_cuda
def test_in_a_graph(runner: Runner) -> None:
    """Replays with other gradients and another rate are eager steps; eager steps between them do no harm."""
    if runner.backend != "triton":
        pytest.skip("Triton alone")
    captured, eager = (example(runner) for _ in range(2))
    tables, others = Tables(), Tables()
    for group, own in ((captured, tables), (eager, others)):
        adamw([group], max_norm=0.3, tables=own, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        norm = adamw([captured], max_norm=0.3, tables=tables, backend="triton")
    bystander = example(runner)
    for step in range(12):
        for group in (captured, eager):
            put(group, gradients(runner, SHAPES, step))
            group.rate.fill_(0.01 / (1 + step))  # type: ignore[union-attr]
        adamw([bystander], max_norm=0.3, tables=tables, backend="triton")
        graph.replay()
        expected = adamw([eager], max_norm=0.3, tables=others, backend="triton")
        assert torch.equal(norm, expected)  # type: ignore[arg-type]
        for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
            assert all(map(torch.equal, getattr(captured, name), getattr(eager, name))), (step, name)


@on_cuda
def test_a_graph_needs_a_step_before(runner: Runner) -> None:
    if runner.backend != "triton":
        pytest.skip("Triton alone")
    group = example(runner)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="no step was made with these tensors before"), torch.cuda.graph(graph):
        adamw([group], backend="triton")


@on_cuda
def test_steps_that_nobody_waits_for(runner: Runner) -> None:
    """Gradients at new addresses in each step, while the device is behind: tables are not overwritten too early."""
    if runner.backend != "triton":
        pytest.skip("Triton alone")
    slow, patient = (example(runner) for _ in range(2))
    tables, others = Tables(), Tables()
    drawn = [gradients(runner, SHAPES, step) for step in range(20)]
    for found in drawn:
        adamw([patient._replace(gradients=found)], max_norm=0.3, tables=others, backend="triton")
        torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    for found in drawn:
        adamw([slow._replace(gradients=found)], max_norm=0.3, tables=tables, backend="triton")
    assert all(map(torch.equal, slow.parameters, patient.parameters))


@needs_triton
@pytest.mark.parametrize("capability", [90, 80])
def test_kernels_compile_without_spilling(capability: int) -> None:
    found, pinned = compile_report("compile_adamw.py", capability), "x".join(map(str, PINNED))
    assert {f"norm {pinned}", f"update {pinned}", "factors norm update", "factors update", "factors norm"} <= {*found}
    for name, used in found.items():
        # For compute capability 8.0 a tile of eight warps that is not pinned keeps two words in memory.
        assert used["stack"] <= (0 if capability >= 90 or name.endswith(pinned) else 8), (name, used)
        assert used["waits"] == (capability >= 90), (name, used)
        if name.startswith("norm"):
            assert used["wide_loads"] >= 2, (name, used)
        elif name.startswith("update"):
            assert used["wide_loads"] >= 4 and used["wide_stores"] >= 3, (name, used)


P = [torch.zeros(3, 4)]
GROUP = group_of(P, [torch.zeros(3, 4)])
STRIDED = torch.zeros(3, 8)[:, ::2]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"gradients": []}, {}, ValueError, r"groups\[0\].gradients must be 1 like the parameters, got 0"),
        ({"gradients": [torch.zeros(4, 3)]}, {}, ValueError, r"gradients\[0\] must be \[3, 4\] like the parameter"),
        ({"gradients": [torch.zeros(3, 4).int()]}, {}, TypeError, r"gradients\[0\] must be one of float32, bfloat16"),
        ({"gradients": [torch.zeros(3, 4).double()]}, {}, TypeError, r"gradients\[0\]"),
        ({"gradients": [None]}, {}, TypeError, r"gradients\[0\] must be a tensor, got NoneType"),
        ({"parameters": [P[0].half()]}, {}, TypeError, r"parameters\[0\] must be one of float32, float64"),
        ({"parameters": [STRIDED]}, {}, ValueError, r"must fill its memory, without holes or overlaps"),
        ({"parameters": [torch.zeros(1, 4).expand(3, 4)]}, {}, ValueError, r"must fill its memory"),
        ({"exp_avgs": [torch.zeros(4, 3).T]}, {}, ValueError, r"exp_avgs\[0\] must have strides \[4, 1\]"),
        ({"exp_avg_sqs": [P[0].double()]}, {}, TypeError, r"exp_avg_sqs\[0\]"),
        ({"halves": [P[0]]}, {}, TypeError, r"halves\[0\] must be one of bfloat16, float16"),
        ({"halves": [torch.zeros(4, 3, dtype=HALF).T]}, {}, ValueError, r"halves\[0\] must have strides"),
        ({"steps": [torch.zeros(2)]}, {}, ValueError, r"steps\[0\] must be one number, got \[2\]"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, {}, TypeError, r"steps\[0\]"),
        ({"rate": -1.0}, {}, ValueError, "rate must be finite and at least 0"),
        ({"rate": torch.zeros(2)}, {}, ValueError, r"rate must be one number, got \[2\]"),
        ({"rate": torch.zeros((), dtype=DOUBLE)}, {}, TypeError, "rate must be one of float32"),
        ({"betas": (0.9, 1.0)}, {}, ValueError, r"betas must be two numbers, at least 0 and below 1"),
        ({"epsilon": math.nan}, {}, ValueError, "epsilon must be finite"),
        ({"weight_decay": math.inf}, {}, ValueError, "weight_decay must be finite"),
        ({}, {"max_norm": -1.0}, ValueError, "max_norm must be at least 0, got -1"),
        ({}, {"max_norm": math.nan}, ValueError, "max_norm must be at least 0, got nan"),
        ({}, {"max_norm": torch.ones(())}, TypeError, "max_norm must be a number or None"),
        ({}, {"config": (4096, 512, 4)}, TypeError, "config must be a AdamWConfig, got tuple"),
        ({}, {"config": AdamWConfig(4096, 500, 4)}, ValueError, "block must be a power of two from 64 to 65536"),
        ({}, {"config": AdamWConfig(1024, 2048, 4)}, ValueError, "block must be at most chunk"),
        ({}, {"config": AdamWConfig(1024, 512, 3)}, ValueError, "warps must be one of"),
        ({}, {"backend": "cuda"}, ValueError, "backend='cuda' is not known"),
    ],
)
def test_refused(change: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adamw([GROUP._replace(**change)], **options)


def test_refused_altogether() -> None:
    with pytest.raises(TypeError, match=r"groups\[1\] must be an AdamWGroup, got list"):
        adamw([GROUP, []])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"gradients\[1\] must be one of float32"):
        gradient_norm([P[0], P[0].int()])
    double = group_of([P[0].double()], [P[0].double()])
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        adamw([double], backend="triton")
    adamw([double], max_norm=1.0)


def test_float64_on_the_reference() -> None:
    runner = Runner("cpu", "reference", DOUBLE)
    parameters = [randn(*shape, seed=2, dtype=DOUBLE) for shape in SHAPES]
    group = group_of(parameters, [torch.zeros_like(one) for one in parameters])
    exact = Exact([group])
    for step in range(3):
        found = [one.double() for one in gradients(runner, SHAPES, step)]
        put(group, found)
        norm = adamw([group], max_norm=0.3)
        assert norm is not None and float(norm) == pytest.approx(exact.step(found, 0.3), rel=1e-12)
    for one, true in zip(group.parameters, exact.parameters, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-10, atol=1e-10)
