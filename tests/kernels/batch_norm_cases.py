"""What the tests of the batch norm share: tensors, PyTorch's operations, and the comparison with float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import DOUBLE, FLOAT, Runner, poisoned_memory, randn
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.batch_norm import ResidualNorm, RunningMoments, batch_norm

LAST = torch.channels_last
MOMENTUM = 0.75
Given = dict[str, Tensor]
# B, C, H, W: two values per channel, odd channels and rows, more channels than a program has, several groups.
SMALL = [(2, 1, 1, 1), (3, 5, 4, 3), (2, 64, 5, 7), (1, 130, 9, 2), (2, 96, 24, 11)]
LARGE = [(32, 64, 56, 56), (32, 256, 56, 56), (4, 2048, 7, 7), (32, 512, 28, 28), (3, 24, 61, 67), (32, 1024, 14, 14)]
KINDS = [(False, False), (False, True), (True, True), (True, False)]
"""With a residual, with a ReLU."""
kinds = pytest.mark.parametrize(("residual", "relu"), KINDS, ids=["norm", "relu", "residual-relu", "residual"])


def given(runner: Runner, shape: tuple[int, ...], residual: bool, mean: float = 0.5, joint: bool = False) -> Given:
    """x, weight, bias, the gradient of the result, perhaps a residual and that one's norm, in channels_last."""
    wide = torch.promote_types(runner.dtype, FLOAT)
    channels = shape[1]
    found = {
        "x": (randn(runner, *shape) + mean).contiguous(memory_format=LAST),
        "weight": randn(runner, channels, seed=1).to(wide) + 1,
        "bias": randn(runner, channels, seed=2).to(wide),
        "grad": randn(runner, *shape, seed=3).contiguous(memory_format=LAST),
    }
    if residual:
        found["residual"] = randn(runner, *shape, seed=4).contiguous(memory_format=LAST)
    if joint:
        found["residual"] = 1.5 * found["residual"] - mean
        found["residual_weight"] = randn(runner, channels, seed=5).to(wide) - 1
        found["residual_bias"] = randn(runner, channels, seed=6).to(wide)
    return found


def results(norm: Any, tensors: Given, relu: bool) -> dict[str, Tensor]:
    """What a batch norm returns, and the gradients of everything that it takes."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "grad"}
    channels, x = tensors["x"].shape[1], tensors["x"]
    wide = torch.promote_types(x.dtype, FLOAT)
    names = ["mean", "variance", *(["residual_mean", "residual_variance"] * ("residual_weight" in tensors))]
    moments = {name: torch.zeros(channels, dtype=wide, device=x.device) for name in names}
    out = norm(leaves, relu, *moments.values())
    out.backward(tensors["grad"].to(out.dtype))
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == len(leaves)
    return {"out": out.detach()} | moments | gradients


def plain(leaves: Given, relu: bool, *moments: Tensor) -> Tensor:
    """PyTorch's operations in the dtype of x."""

    def norm(name: str, before: str, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        vectors = leaves[f"{before}weight"], leaves[f"{before}bias"]
        return F.batch_norm(leaves[name], mean, variance, *vectors, training=True, momentum=MOMENTUM)

    y = norm("x", "", *moments[:2])
    if "residual_weight" in leaves:
        y = y + norm("residual", "residual_", *moments[2:])
    elif "residual" in leaves:
        y = y + leaves["residual"]
    return y.relu() if relu else y


def ours(backend: str) -> Any:
    def norm(leaves: Given, relu: bool, *moments: Tensor) -> Tensor:
        return batch_norm(**options_of(leaves, *moments), relu=relu, backend=backend)

    return norm


def options_of(leaves: Given, *moments: Tensor) -> dict[str, Any]:
    """What batch_norm takes of tensors by their names, with running averages if given."""
    found: dict[str, Any] = {name: leaves[name] for name in ("x", "weight", "bias", "residual") if name in leaves}
    if moments:
        found["running"] = RunningMoments(*moments[:2], momentum=MOMENTUM)
    if "residual_weight" in leaves:
        running = RunningMoments(*moments[2:], momentum=MOMENTUM) if moments else None
        found["residual_norm"] = ResidualNorm(leaves["residual_weight"], leaves["residual_bias"], running)
    return found


def check(
    runner: Runner, shape: tuple[int, ...], residual: bool, relu: bool, mean: float = 0.5, joint: bool = False
) -> None:
    """Results and gradients against float64, where nothing may be read that was not written."""
    tensors = given(runner, shape, residual, mean, joint)
    doubles = {name: tensor.to(DOUBLE) for name, tensor in tensors.items()}
    if relu:  # where its input is nearly 0, rounding may let through what float64 does not: no gradient comes there
        before = plain(doubles, False).abs()
        tiny = 16 * torch.finfo(runner.dtype).eps if runner.dtype != DOUBLE else 1e-9
        for some in (tensors, doubles):
            some["grad"] = some["grad"].masked_fill(before <= tiny * (1 + before), 0.0)
        assert before.numel() < 1000 or float((tensors["grad"] == 0).double().mean()) < 0.3
    with poisoned_memory():
        got = results(ours(runner.backend), tensors, relu)
    assert got["out"].dtype == runner.dtype and got["out"].is_contiguous(memory_format=LAST)
    exact = results(plain, doubles, relu)
    near = results(plain, tensors, relu)
    for name, value in exact.items():
        # The reference's sums are PyTorch's general ones, on a GPU up to 2.6 times as far off as cuDNN's.
        times = 4 if runner.backend == "reference" and runner.device == "cuda" else 2
        error, allowed = (got[name].to(DOUBLE) - value).abs(), times * (near[name].to(DOUBLE) - value).abs().amax()
        rounding = 2 * torch.finfo(got[name].dtype).eps * (value.abs() + 4 + abs(mean))
        if runner.dtype == DOUBLE:  # PyTorch's own result is what is compared with
            rounding = rounding + 1e-11 * (1 + value.abs())
        wrong = ~(error <= allowed + rounding)  # also where an error is not a number, as of memory never written
        assert not wrong.any(), f"{name}: {error[wrong].max():.3g}, allowed {float(allowed):.3g}"
