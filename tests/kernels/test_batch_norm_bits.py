"""The bits of batch_norm's ReLU, which the backward pass reads instead of the result."""

from __future__ import annotations

import pytest
import torch
from batch_norm_cases import given
from fused_cases import FLOAT, HALF, Runner, on_triton, poisoned_memory
from torch.nn import functional as F

from fastmetro_kernels.batch_norm import batch_norm, ops


@on_triton
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 13, 4, 5), (2, 64, 5, 7), (1, 130, 9, 2), (2, 200, 24, 11)])
def test_bits_tell_where_the_result_is_positive(runner: Runner, shape: tuple[int, ...]) -> None:
    """For 64 channels a row of bytes at each position, low bits first; of what is no number, no bit."""
    tensors = given(runner, shape, True)
    tensors["residual"][0, 0, 0, 0] = torch.nan
    arguments = [tensors[name] for name in ("x", "residual", "weight", "bias")]
    with poisoned_memory():
        out, _, _, bits = ops.batch_norm_triton(*arguments, None, None, None, None, 0.0, 1e-5, True, True, ())
    let = F.pad((out > 0).permute(0, 2, 3, 1).flatten(0, 2), (0, -shape[1] % 64))
    powers = 2 ** torch.arange(8, device=let.device)
    expected = (let.unflatten(1, (-1, 8, 8)) * powers).sum(3).transpose(0, 1).to(torch.uint8)
    assert out.isnan().any() and torch.equal(bits, expected)
    assert ops.batch_norm_triton(*arguments, None, None, None, None, 0.0, 1e-5, True, False, ())[3].numel() == 0


@on_triton
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_what_rounds_to_zero_lets_no_gradient_through(runner: Runner, dtype: torch.dtype) -> None:
    """As PyTorch's ReLU, which sees rounded numbers; 1e-9 is none of float16."""
    x = torch.tensor([-1.0, 1.0], device=runner.device).reshape(2, 1, 1, 1).expand(2, 9, 1, 1).to(dtype)
    residual = torch.zeros_like(x, requires_grad=True)
    vectors = [torch.full((9,), value, device=runner.device) for value in (1e-9, 0.0)]
    out = batch_norm(x, *vectors, residual=residual, relu=True, backend="triton")
    out.backward(torch.ones_like(out))
    assert residual.grad is not None and torch.equal(residual.grad[0], torch.zeros_like(x[0]))
    assert torch.equal(residual.grad[1], torch.full_like(x[1], dtype == FLOAT))


@on_triton
def test_bits_are_made_only_for_gradients(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing like the result is kept: x, the bits and a few vectors."""
    tensors = given(runner, (2, 6, 4, 5), True)
    arguments = {name: tensors[name] for name in ("x", "weight", "bias", "residual")}
    asked: list[bool] = []
    op = ops.batch_norm_triton
    monkeypatch.setattr(ops, "batch_norm_triton", lambda *all_: (asked.append(all_[-2]), op(*all_))[1])
    batch_norm(**arguments, relu=True, backend="triton")
    arguments["residual"].requires_grad_()
    with torch.no_grad():
        batch_norm(**arguments, relu=True, backend="triton")
    batch_norm(**arguments, backend="triton")
    assert asked == [False] * 3
    out = batch_norm(**arguments, relu=True, backend="triton")
    assert asked[3] is True
    kept = [one for one in out.grad_fn.saved_tensors if one is not None]
    assert [one.numel() for one in kept] == [240, 6, 6, 6, 6, 320] and kept[0].data_ptr() == tensors["x"].data_ptr()
