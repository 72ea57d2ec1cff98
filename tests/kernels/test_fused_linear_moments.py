"""Moments that the fused linear layer leaves for a layer norm, and tokens that it puts in front."""

from __future__ import annotations

from typing import Any

import torch
from fused_cases import Runner, everywhere, on_each_backend, on_triton, poisoned_memory, randn, surrounded
from linear_cases import check, moments_of, tensors

from fastmetro_kernels.fused import fused_linear, fused_linear_moments


@on_each_backend
def test_leading_tokens_come_first_as_they_are(runner: Runner) -> None:
    shapes = (((3,), (1, 18)), ((3,), (3, 2, 18)), ((2, 2), (2, 2, 17, 18)), ((), (4, 18)), ((2,), (0, 18)))
    for samples, leading in shapes:
        x, front = randn(runner, *samples, 19, 150), surrounded(randn(runner, *leading, seed=4))
        weight, bias = randn(runner, 18, 150), randn(runner, 19, 18)
        options: dict[str, Any] = {"normalize": 1e-5, "relu": True, "backend": runner.backend}
        with poisoned_memory():
            got = fused_linear(x, weight, bias, leading=front, **options)
        count = front.shape[-2]
        assert got.shape == (*samples, count + 19, 18) and got.is_contiguous()
        assert torch.equal(got[..., :count, :], front.expand(*samples, count, 18))
        torch.testing.assert_close(got[..., count:, :], fused_linear(x, weight, bias, **options))
    alone = fused_linear(randn(runner, 2, 0, 150), weight, leading=front.expand(2, 0, 18), backend=runner.backend)
    assert alone.shape == (2, 0, 18)
    alone = fused_linear(randn(runner, 2, 0, 150), weight, leading=bias, backend=runner.backend)
    assert torch.equal(alone, bias.expand(2, 19, 18))


@everywhere
def test_moments_are_those_of_the_rounded_result(runner: Runner) -> None:
    for tokens, width, features in ((35, 40, 130), (3, 300, 16), (1, 16, 1)):
        x, weight, bias, residual = tensors(runner, 2, tokens, width, features, "feature", "sample")
        front = randn(runner, 2, 2, features, seed=4)
        for added in ({"residual": residual}, {"leading": front}, {"leading": front[:, :0]}):
            with poisoned_memory():
                out, moments = fused_linear_moments(x, weight, bias, **added, backend=runner.backend)
            assert torch.equal(out, fused_linear(x, weight, bias, **added, backend=runner.backend))
            assert moments.shape[:-2] == out.shape[:-1] and moments.shape[-1] == 3
            torch.testing.assert_close(moments, moments_of(out, int(moments[0, 0, 0, 0])), rtol=1e-4, atol=1e-4)


@on_each_backend
def test_a_chain_hands_on_its_moments(runner: Runner) -> None:
    """As in a transformer: a residual stream, read by a slice of the tokens behind a norm."""
    x, weight, bias, residual = tensors(runner, 2, 20, 70, 150, "feature", "sample")
    out, moments = fused_linear_moments(x, weight, bias, residual=residual, backend=runner.backend)
    reader = randn(runner, 24, 150) / 12
    sums = reader.to(moments.dtype).sum(1)
    check(runner, out[:, 1:], reader, normalize=1e-5, moments=moments[:, 1:], weight_sums=sums)
    first, its_moments = out[:1, :1].expand(3, -1, -1), moments[:1, :1].expand(3, -1, -1, -1)
    check(runner, first, reader, normalize=1e-5, moments=its_moments, weight_sums=sums)


@on_triton
def test_no_tokens_to_multiply(runner: Runner) -> None:
    front = randn(runner, 2, 3, 18)
    x, weight = randn(runner, 2, 0, 20), randn(runner, 18, 20)
    out, moments = fused_linear_moments(x, weight, leading=front, backend=runner.backend)
    assert torch.equal(out, front) and torch.equal(moments, moments_of(front))


@everywhere
def test_a_large_mean_is_taken_off(runner: Runner) -> None:
    """Rows a hundred deviations away from 0, in half precision as it rounds them."""
    sign = torch.tensor([1.0, -1.0], device=runner.device, dtype=runner.dtype)
    x = randn(runner, 2, 20, 300) + 100 * sign[:, None, None]
    check(runner, x, randn(runner, 18, 300) / 17, normalize=1e-5)
