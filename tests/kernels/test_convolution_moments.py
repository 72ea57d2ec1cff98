"""Convolutions that tell the moments of their results, on every backend that is here; what they refuse."""

from __future__ import annotations

import pytest
import torch
from test_convolution import GPU, RUNNERS, SHAPES, budget, make
from torch import Tensor

from fastmetro_kernels.convolution import ConvolutionConfig, convolution, convolution_moments, lay_out, ops
from fastmetro_kernels.convolution.api import layer_of
from fastmetro_kernels.convolution.configs import usable
from fastmetro_kernels.convolution.moments import ConvolutionMoments, moments_config

WIDE = [
    (32, 56, 56, 64, 256, 1, 1),
    (32, 28, 28, 128, 128, 3, 1),
    (32, 14, 14, 256, 256, 3, 1),
    (32, 7, 7, 512, 2048, 1, 1),
]


def joined(moments: ConvolutionMoments, count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of all results, in float64."""
    mean, squares = moments.values.double()
    sizes = torch.full((mean.shape[0], 1), moments.rows, dtype=torch.float64, device=mean.device)
    sizes[-1] = count - moments.rows * (mean.shape[0] - 1)
    whole = (sizes * mean).sum(0) / count
    return whole, (squares + sizes * (mean - whole).square()).sum(0) / count


def check(out: Tensor, moments: ConvolutionMoments) -> None:
    rows = out.permute(0, 2, 3, 1).flatten(0, 2).double()
    assert moments.values.shape == (2, -(-len(rows) // moments.rows), out.shape[1])
    assert moments.values.dtype == torch.promote_types(out.dtype, torch.float32)
    for group, part in enumerate(rows.split(moments.rows)):
        if group % 97 and group < len(rows) // moments.rows:
            continue  # some of many, and the last
        mean = part.mean(0)
        torch.testing.assert_close(moments.values[0, group].double(), mean, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(
            moments.values[1, group].double(), (part - mean).square().sum(0), rtol=2e-5, atol=2e-5
        )
    mean, variance = joined(moments, len(rows))
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, rows.var(0, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNNERS, ids=str)
def test_against_float64(shape: tuple[int, ...], device: str, backend: str, dtype: torch.dtype) -> None:
    x, weights, _, _, exact = make(shape, device, dtype)
    out, moments = convolution_moments(x, weights, backend=backend)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert float((out.double() - exact).norm()) <= budget(x, weights, exact)
    check(out, moments)


@GPU
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_large_layers(shape: tuple[int, ...]) -> None:
    """The results are those without moments, the same in every run, and in a graph on new images."""
    x, weights, _, _, _ = make(shape, "cuda", torch.bfloat16)
    config = moments_config(x, weights)
    out, moments = convolution_moments(x, weights, backend="native")
    assert torch.equal(out, convolution(x, weights, relu=False, config=config, backend="native"))
    check(out, moments)
    for _ in range(5):
        again = convolution_moments(x, weights, backend="native")
        assert torch.equal(again[0], out) and torch.equal(again[1].values, moments.values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = convolution_moments(x, weights, backend="native")
    x.copy_(x.flip(0).clone())
    graph.replay()
    check(*captured)
    assert not torch.equal(captured[1].values, moments.values)


@GPU
@pytest.mark.parametrize(
    "shape", [(2, 14, 14, 256, 1024, 1, 1), (3, 13, 9, 48, 80, 3, 1), (1, 7, 7, 512, 512, 3, 1)], ids=str
)
def test_every_tile(shape: tuple[int, ...]) -> None:
    x, weights, _, _, exact = make(shape, "cuda", torch.float16)
    configs = [one for one in usable(layer_of(x, weights, None, None).shape) if not one.once]
    assert len(configs) > 8
    for config in configs:
        out, moments = convolution_moments(x, weights, config=config, backend="native")
        assert float((out.double() - exact).norm()) <= budget(x, weights, exact), config
        assert moments.rows == 64 // config.split
        check(out, moments)


@GPU
def test_shapes_when_traced() -> None:
    x, weights, _, _, _ = make((3, 13, 9, 48, 80, 3, 1), "cuda", torch.float16)
    rows = x.permute(0, 2, 3, 1)
    for config in (ConvolutionConfig(64, 1, 2), ConvolutionConfig(64, 4, 2)):
        arguments = rows, weights.weight, weights.bias, 1, 1, list(map(int, config))
        torch.library.opcheck(torch.ops.fastmetro_kernels.convolution_moments_native.default, arguments)
        assert ops.convolution_moments_native(*arguments)[1].shape[1] == -(-3 * 13 * 9 // (64 // config.split))


def test_refused() -> None:
    x, weights, _, branch, _ = make((2, 5, 5, 16, 32, 3, 1), "cpu", torch.float32, second=True)
    assert branch is not None
    with pytest.raises(ValueError, match="weights must be those of one convolution, got a second one"):
        convolution_moments(x, weights)
    alone = weights._replace(second_weight=None)
    with pytest.raises(RuntimeError, match="x requires grad"):
        convolution_moments(x.clone().requires_grad_(), alone)
    with pytest.raises(ValueError, match=r"x must be \[N, 16, H, W\]"):
        convolution_moments(x[:, :8], alone)
    with pytest.raises(ValueError, match="backend='cudnn' is not known"):
        convolution_moments(x, alone, backend="cudnn")
    out, moments = convolution_moments(x[:0], alone)
    assert out.shape == (0, 32, 5, 5) and moments.values.shape == (2, 0, 32)


@GPU
def test_configurations_that_are_refused() -> None:
    x, weights, _, _, _ = make((2, 8, 8, 64, 64, 3, 1), "cuda", torch.float16)
    with pytest.raises(ValueError, match="config: once must be False"):
        convolution_moments(x, weights, config=ConvolutionConfig(64, 1, 1, once=True))
    with pytest.raises(ValueError, match="config: columns must be one of"):
        convolution_moments(x, weights, config=ConvolutionConfig(48, 1, 2))


def test_the_weights_may_change_in_place() -> None:
    """As an optimizer changes them: what is in channels_last is shared, not copied."""
    weight = torch.randn(32, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    weights = lay_out(weight, torch.zeros(32))
    assert weights.weight.data_ptr() == weight.data_ptr()
