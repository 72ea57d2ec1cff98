"""AdamW, clipping and the norm of gradients against float64 on every backend and device."""

from __future__ import annotations

import math

import pytest
import torch
from adamw_cases import (
    LAST,
    SHAPES,
    Exact,
    Plain,
    check,
    example,
    gradients,
    group_of,
    is_pytorchs_kernel,
    on_each,
    on_triton,
    put,
    randn,
)
from fused_cases import BFLOAT, DOUBLE, FLOAT, HALF, Runner

from fastmetro_kernels.adamw import Tables, adamw, gradient_norm, same_layout


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
    plain = Plain([group], is_pytorchs_kernel(runner))
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
