"""What the tests of the fused linear layer share: inputs, the layer in plain PyTorch, and a check against float64."""

from __future__ import annotations

from typing import Any

import torch
from fused_cases import DOUBLE, FLOAT, Runner, assert_within_budget, poisoned_memory, randn
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.fused import fused_linear


def chain(
    x: Tensor, weight: Tensor, bias: Tensor | None, normalize: float | None, residual: Tensor | None, relu: bool
) -> Tensor:
    """The same in plain PyTorch, in the dtype of x."""
    y = x if normalize is None else F.layer_norm(x, x.shape[-1:], eps=normalize)
    y = F.linear(y, weight)
    y = y if bias is None else y + bias
    y = y.relu() if relu else y
    return y if residual is None else y + residual


def moments_of(x: Tensor, part: int = 64) -> Tensor:
    """Count, mean and squared distances from it of the rows of x, for parts of so many features."""
    wide = x.to(torch.promote_types(x.dtype, FLOAT))
    found = []
    for values in wide.split(part, -1):
        mean = values.mean(-1)
        count = torch.full_like(mean, values.shape[-1])
        found.append(torch.stack([count, mean, (values - mean[..., None]).square().sum(-1)], -1))
    return torch.stack(found, -2)


def late(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What a layer norm behind the product needs."""
    return {"moments": moments_of(x), "weight_sums": weight.to(torch.promote_types(x.dtype, FLOAT)).sum(1)}


def check(
    runner: Runner, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, normalize: float | None = None,
    residual: Tensor | None = None, relu: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """The result, held against float64; x, weight, bias and residual may differ in dtype.

    With a layer norm, both in front of the product and as a correction of its sums.
    """
    options |= {"normalize": normalize, "residual": residual, "relu": relu}
    if normalize is not None and "moments" not in options:
        check(runner, x, weight, bias, **options, **late(x, weight))
    options["backend"] = runner.backend
    with poisoned_memory():
        got = fused_linear(x, weight, bias, **options)
    dtype = options.get("out_dtype") or x.dtype
    assert got.dtype == dtype
    wide = [None if tensor is None else tensor.to(DOUBLE) for tensor in (x, weight, bias, residual)]
    exact = chain(wide[0], wide[1], wide[2], normalize, wide[3], relu)
    plain = chain(x.to(weight.dtype), weight, bias, normalize, residual, relu).to(dtype)
    rows = wide[0] if normalize is None else F.layer_norm(wide[0], x.shape[-1:], eps=normalize)
    size = rows.abs() @ wide[1].abs().T + sum(tensor.abs() for tensor in wide[2:] if tensor is not None)
    # Sums in float32, one rounding of the result, and one of the normalised rows, which plain PyTorch rounds too.
    sums = torch.finfo(DOUBLE if x.dtype == DOUBLE else FLOAT).eps * 4
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + size * sums
    if normalize is not None and x.dtype.itemsize == 2:
        rounding = rounding + torch.finfo(x.dtype).eps / 2 * size
    if options.get("moments") is not None and x.numel():  # sums of rows that are not normalised yet
        deviation = (wide[0].var(-1, keepdim=True, unbiased=False) + normalize).sqrt()
        rounding = rounding + sums * (wide[0].abs() @ wide[1].abs().T) / deviation
    assert_within_budget(got, exact, plain, rounding)
    return got


def tensors(
    runner: Runner, batch: int, tokens: int, width: int, features: int, bias: str | None, residual: str | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x with a mean that is not 0, weight, bias and residual."""
    biases = {None: None, "feature": (features,), "token": (tokens, features)}
    residuals = {None: None, "shared": (tokens, features), "sample": (batch, tokens, features)}
    shapes = ((width and (features, width)), biases[bias], residuals[residual])
    rest = [None if shape is None else randn(runner, *shape, seed=i) for i, shape in enumerate(shapes)]
    assert rest[0] is not None
    return 3 * randn(runner, batch, tokens, width, seed=9) + 1, rest[0] * width**-0.5, rest[1], rest[2]
