"""The native batch norm on compute capability 9.0, in the emulator, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import test_batch_norm
import torch
from emulation import build
from emulation.batch_norm import Found, backward, forward
from fused_cases import BFLOAT, DOUBLE, FLOAT, HALF, Runner
from torch import Tensor

from fastmetro_kernels.batch_norm import batch_norm, batch_norm_twice, native
from fastmetro_kernels.batch_norm.native import CONFIGS, NativeConfig

pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
EPSILON, MOMENTUM = 1e-5, 0.75
# Rows, channels, lanes, blocks of a cluster, sweeps in shared memory: two rows, fewer than one sweep and than blocks,
# one row more than a sweep, some channels of a block missing, several blocks of channels, rows that are read again,
# more rows than shared memory has room for.
SIZES = [
    (2, 8, (8, 1), 99),
    (2, 8, (2, 16), 99),
    (31, 72, (8, 1), 99),
    (33, 64, (8, 1), 99),
    (131, 40, (4, 2), 99),
    (13, 24, (2, 16), 99),
    (385, 16, (2, 1), 1),
    (701, 72, (8, 4), 2),
    (517, 32, (4, 8), 99),
    (1027, 64, (8, 2), 9),
    (1153, 24, (2, 2), 3),
    (3500, 16, (2, 1), 99),
]
# Residual, ReLU, two gradients, whether the gradient in front of the ReLU is asked for.
KINDS = {
    "norm": (False, False, False, False),
    "relu": (False, True, False, False),
    "relu-more": (False, True, True, False),
    "more": (False, False, True, False),
    "residual": (True, False, False, False),
    "residual-more": (True, False, True, True),
    "residual-relu": (True, True, False, True),
    "residual-relu-more": (True, True, True, True),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)


def randn(*shape: int, seed: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def given(rows: int, channels: int, dtype: torch.dtype, kind: tuple[bool, ...], mean: float = 0.5) -> Found:
    """x, weight, bias, the gradient of the result, and what else this kind has."""
    found = {"x": randn(rows, channels, seed=rows, dtype=DOUBLE).add(mean).to(dtype)}
    found |= {"weight": randn(channels, seed=1) + 1, "bias": randn(channels, seed=2)}
    others = {"grad": True, "residual": kind[0], "more": kind[2]}
    return found | {
        name: randn(rows, channels, seed=3 + k, dtype=dtype) for k, (name, there) in enumerate(others.items()) if there
    }


def exactly(tensors: Found, kind: tuple[bool, ...], let: Tensor | None) -> Found:
    """Everything that both passes give, in the dtype of x and by PyTorch's operations; `let`: what the ReLU lets
    through backward, where it shall not be found out."""
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    wide = torch.promote_types(x.dtype, FLOAT)
    variance, mean = torch.var_mean(x.to(wide), 0, correction=0)
    inverse = torch.rsqrt(variance + EPSILON)
    apart = x.to(wide) - mean
    y = apart * inverse * weight + bias
    y = (y + tensors["residual"] if kind[0] else y).to(x.dtype)
    out = y.relu() if kind[1] else y
    g = tensors["grad"] + tensors["more"] if kind[2] else tensors["grad"]
    if kind[1]:
        g = torch.where(out > 0 if let is None else let, g, 0)
    common, times = g.to(wide).sum(0), (g.to(wide) * apart).sum(0)
    grad_x = (g - common / len(x) - apart * times * inverse**2 / len(x)) * inverse * weight
    found = {"out": out, "mean": mean, "variance": variance, "grad_x": grad_x.to(x.dtype),
             "grad_weight": times * inverse, "grad_bias": common}  # fmt: skip
    return found | ({"behind": g} if kind[3] else {})


def both(tensors: Found, kind: tuple[bool, ...], config: tuple[int, int], held: int = 99, **options: object) -> Found:
    """Forward and backward, as the op runs them."""
    residual, relu, _, behind = kind
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    found = forward(x, weight, bias, config, residual=tensors.get("residual"), relu=relu, held=held, **options)
    kept = found["out"] if residual and relu else None
    gradients = backward(
        tensors["grad"], x, weight, bias, found["mean"], found["variance"], config, more=tensors.get("more"), out=kept,
        relu=relu, behind=behind, held=held, **options,
    )  # fmt: skip
    return found | gradients


def check(tensors: Found, kind: tuple[bool, ...], got: Found, mean: float = 0.5) -> None:
    """No number further from float64 than twice the worst of PyTorch in the same dtype, plus roundings.

    What nearly is 0 in front of the ReLU, rounding may let through: there is what the kernel has let through right.
    """
    let = got["out"] > 0
    doubles = {name: one.to(DOUBLE) for name, one in tensors.items()}
    exact, near = exactly(doubles, kind, let), exactly(tensors, kind, let)
    if kind[1]:
        before = exactly(doubles, (kind[0], False, *kind[2:]), None)["out"]
        sure = before.abs() > 16 * torch.finfo(got["out"].dtype).eps * (1 + before.abs() + abs(mean))
        assert torch.equal(let[sure], (before > 0)[sure])
    for name, value in exact.items():
        error, allowed = (got[name].to(DOUBLE) - value).abs(), 2 * (near[name].to(DOUBLE) - value).abs().amax()
        rounding = 2 * torch.finfo(got[name].dtype).eps * (value.abs() + 4 + abs(mean))
        excess = error - (allowed + rounding)
        assert bool((excess <= 0).all()), f"{name}: {error.amax():.3g}, allowed {float(allowed):.3g}"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [KINDS["relu"], KINDS["residual-relu-more"]], ids=["relu", "residual-relu-more"])
def test_emulated(kind: tuple[bool, ...], size: tuple[int, int, tuple[int, int], int]) -> None:
    rows, channels, config, held = size
    tensors = given(rows, channels, (HALF, BFLOAT)[rows % 2], kind)
    check(tensors, kind, both(tensors, kind, config, held, schedule="random", seed=rows))


@kinds
@dtypes
def test_every_kind(dtype: torch.dtype, kind: tuple[bool, ...]) -> None:
    tensors = given(177, 40, dtype, kind)
    for held in (99, 1):
        check(tensors, kind, both(tensors, kind, (4, 2), held))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config(config: NativeConfig) -> None:
    kind = KINDS["residual-relu-more"]
    tensors = given(600, 24, HALF, kind)
    check(tensors, kind, both(tensors, kind, config))


@pytest.mark.parametrize("schedule", build.SCHEDULES)
def test_in_any_order(schedule: str) -> None:
    """Equal bits, whichever thread comes first, and wherever rows are kept."""
    kind = KINDS["residual-relu-more"]
    tensors = given(333, 72, HALF, kind)
    expected = both(tensors, kind, (8, 4))
    for name, value in both(tensors, kind, (8, 4), schedule=schedule, seed=5).items():
        assert torch.equal(value, expected[name]), name


def test_gradients_do_not_depend_on_where_rows_are_kept() -> None:
    """But for the order of their sums: a second gradient that is not stored is rounded where it is made again, too."""
    kind = KINDS["relu-more"]
    tensors = given(150, 16, HALF, kind)
    # Sums over all rows are exact, those of two gradients are not.
    for name, finest in (("grad", 16.0), ("more", 1 / 32), ("x", 1 / 4)):
        tensors[name] = (tensors[name] * 4).round() * finest
    assert not torch.equal((tensors["grad"] + tensors["more"]).float(), tensors["grad"].float() + tensors["more"])
    tensors["weight"], tensors["bias"] = torch.ones(16), torch.zeros(16)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    moments = torch.zeros(16), torch.ones(16)
    one, other = (
        backward(tensors["grad"], x, weight, bias, *moments, (2, 1), more=tensors["more"], relu=True, held=held)
        for held in (99, 1)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", [(8, 1), (4, 4)], ids=str)
def test_a_mean_far_from_zero_keeps_digits(config: tuple[int, int]) -> None:
    kind = KINDS["norm"]
    for held in (99, 1):
        tensors = given(300, 24, HALF, kind, mean=100.0)
        got = both(tensors, kind, config, held)
        check(tensors, kind, got, 100.0)
        exact = tensors["x"].double().var(0, correction=0)
        torch.testing.assert_close(got["variance"].double(), exact, rtol=1e-5, atol=0)


def test_blocks_that_are_far_apart_are_joined_by_their_means() -> None:
    kind = KINDS["norm"]
    tensors = given(256, 16, BFLOAT, kind)
    tensors["x"] += torch.linspace(-400, 400, 256)[:, None].to(BFLOAT)
    got = forward(tensors["x"], tensors["weight"], tensors["bias"], (2, 4))
    exact = tensors["x"].double()
    torch.testing.assert_close(got["variance"].double(), exact.var(0, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(got["mean"].double(), exact.mean(0), rtol=1e-5, atol=1e-4)


def test_running_averages_and_batches() -> None:
    """As PyTorch's module has them; batches are counted once, whatever the blocks."""
    tensors = given(150, 40, HALF, KINDS["norm"])
    module = torch.nn.BatchNorm1d(40, momentum=MOMENTUM)
    mean, variance, batches = (one.clone() for one in module.buffers())
    for _ in range(2):
        module(tensors["x"].float())
        forward(tensors["x"], tensors["weight"], tensors["bias"], (2, 4), running=(mean, variance), batches=batches,
                momentum=MOMENTUM)  # fmt: skip
    torch.testing.assert_close(mean, module.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance, module.running_var, rtol=1e-5, atol=1e-5)
    assert batches == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_channel(value: float) -> None:
    kind = KINDS["residual-relu"]
    tensors = given(90, 24, HALF, kind)
    expected = both(tensors, kind, (2, 2))
    for row in (0, 1, 70, 89):
        spoiled = tensors | {"x": tensors["x"].clone()}
        spoiled["x"][row, 5] = value
        got = both(spoiled, kind, (2, 2))
        others = [channel for channel in range(24) if channel != 5]
        for name, one in got.items():
            assert torch.equal(one[..., others], expected[name][..., others]), name
        for name in ("out", "variance", "grad_x"):
            assert bool(got[name][..., 5].isnan().all()), name


def test_a_channel_of_one_value() -> None:
    """No variance: what rounding leaves of it must not be negative, and gradients stay finite."""
    kind = KINDS["relu"]
    tensors = given(200, 8, HALF, kind)
    tensors["x"][:] = 3.1
    got = both(tensors, kind, (8, 2))
    assert bool((got["variance"] == 0).all()) and all(bool(one.isfinite().all()) for one in got.values())


def rows_of(image: Tensor | None) -> Tensor | None:
    """[B, C, H, W] in channels_last as [rows, C], on the same memory."""
    return None if image is None else image.permute(0, 2, 3, 1).flatten(0, 2)


def image_of(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def emulated_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, epsilon: float, relu: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = rows_of(x)
    assert rows is not None
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    found = forward(
        rows, weight, bias, (config[0], config[1]), residual=rows_of(residual), relu=relu, running=running,
        batches=batches, momentum=momentum, epsilon=epsilon,
    )  # fmt: skip
    return image_of(found["out"], x), found["mean"], found["variance"]


def emulated_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, epsilon: float, relu: bool, behind: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g, rows = rows_of(grad), rows_of(x)
    assert g is not None and rows is not None
    found = backward(
        g, rows, weight, bias, mean, variance, (config[0], config[1]), more=rows_of(more), out=rows_of(out), relu=relu,
        behind=behind, epsilon=epsilon,
    )  # fmt: skip
    before = image_of(found["behind"], x) if behind else x.new_empty(0)
    return image_of(found["grad_x"], x), found["grad_weight"], found["grad_bias"], before


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops take CPU tensors, and run in the emulator."""
    monkeypatch.setattr(native, "reasons", lambda *_: [])
    with torch.library._scoped_library(native.NAMESPACE, "IMPL") as library:
        library.impl(native.OPERATOR, emulated_forward, "CPU")
        library.impl(native.BACKWARD, emulated_backward, "CPU")
        yield


@pytest.mark.usefixtures("emulated")
@test_batch_norm.kinds
def test_the_public_op(residual: bool, relu: bool) -> None:
    """As on every backend: its result, moments and gradients, against float64."""
    test_batch_norm.check(Runner("cpu", "native", HALF), (2, 24, 5, 7), residual, relu)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("asked", ["x", "residual", "x residual"])
def test_the_public_op_with_two_takers_and_some_gradients(asked: str, relu: bool) -> None:
    tensors = test_batch_norm.given(Runner("cpu", "native", HALF), (2, 16, 4, 5), True)
    expected = test_batch_norm.results(test_batch_norm.ours("native"), tensors, relu)
    for call in (batch_norm, batch_norm_twice):
        leaves = {name: one.detach().requires_grad_(name in asked.split()) for name, one in tensors.items()}
        named = {name: leaves[name] for name in ("x", "weight", "bias", "residual")}
        found = call(**named, relu=relu, config=native.pinned_native(40, 16), backend="native")
        outs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outs, [tensors["grad"] / len(outs)] * len(outs))
        for name in asked.split():
            grad = leaves[name].grad
            assert grad is not None and torch.equal(grad, expected[f"grad_{name}"]), name


@pytest.mark.usefixtures("emulated")
def test_the_public_op_is_traced() -> None:
    tensors = test_batch_norm.given(Runner("cpu", "native", HALF), (2, 16, 4, 5), True)
    norm = test_batch_norm.ours("native")
    expected = test_batch_norm.results(norm, tensors, True)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for name, value in test_batch_norm.results(compiled, tensors, True).items():
            assert torch.equal(value, expected[name]), name
