"""Two pointwise convolutions in one kernel against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.convolution import PairConfig, convolution_pair, lay_out, pair_configs
from fastmetro_kernels.convolution.configs import NARROW, SHARED_BYTES, WIDE, pair_bytes

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
# images, height, width, channels, wide, narrow, channels of the second input and its stride
SHAPES = [
    (1, 56, 56, 64, 256, 64, 0, 1),
    (1, 56, 56, 64, 256, 128, 64, 1),
    (1, 28, 28, 128, 512, 128, 256, 2),
    (2, 9, 7, 48, 512, 256, 0, 1),
    (1, 14, 14, 256, 1024, 256, 512, 2),
    (3, 14, 14, 256, 1024, 256, 0, 1),
    (1, 1, 1, 16, 256, 64, 0, 1),
]


def make(shape, device="cpu", dtype=torch.float32):
    n, h, w, c, k, m, more, stride = shape
    g = torch.Generator().manual_seed(sum(shape))

    def images(channels: int, *size: int) -> torch.Tensor:
        return torch.randn(n, channels, *size, generator=g).to(device, dtype).to(memory_format=torch.channels_last)

    def convolution(outputs: int, inputs: int) -> torch.Tensor:
        return (torch.randn(outputs, inputs, 1, 1, generator=g) / inputs**0.5).to(device, dtype)

    second = (convolution(k, more), torch.randn(k, generator=g).to(device), stride) if more else None
    weights = lay_out(convolution(k, c), torch.randn(k, generator=g).to(device), second=second)
    following = lay_out(convolution(m, k), torch.randn(m, generator=g).to(device))
    branch = images(more, h * stride, w * stride) if more else None
    return images(c, h, w), weights, following, images(k, h, w), branch


def exact(x, weights, following, residual, second, wide=None):
    """Both results in float64; the second of `wide`, if given, which is rounded."""
    as_conv = lambda weight: weight.double().permute(0, 3, 1, 2)  # noqa: E731
    y = F.conv2d(x.double(), as_conv(weights.weight), weights.bias.double())
    if residual is not None:
        y = y + residual.double()
    if second is not None:
        y = y + F.conv2d(second.double(), as_conv(weights.second_weight), None, weights.second_stride)
    y = y.relu()
    used = y if wide is None else wide.double()
    return y, F.conv2d(used, as_conv(following.weight), following.bias.double()).relu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape) -> None:
    x, weights, following, kept, branch = make(shape)
    got = convolution_pair(x, weights, following, residual=kept, second=branch)
    for mine, want in zip(got, exact(x, weights, following, kept, branch), strict=True):
        assert mine.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


def test_configurations_fit() -> None:
    for narrow in NARROW:
        for chunks in (1, 4, 12):
            configs = pair_configs(chunks, narrow)
            assert configs and all(pair_bytes(narrow, config.stages) <= SHARED_BYTES for config in configs)
    assert WIDE == (256, 512, 1024)


def test_bad_input_is_named() -> None:
    x, weights, following, kept, branch = make((1, 4, 4, 16, 256, 64, 0, 1))
    with pytest.raises(ValueError, match=r"weights must be 1 x 1 of stride 1 to \(256, 512, 1024\)"):
        convolution_pair(x, lay_out(torch.zeros(128, 16, 1, 1), torch.zeros(128)), following)
    with pytest.raises(ValueError, match="following must be 1 x 1 of stride 1 from 256"):
        convolution_pair(x, weights, lay_out(torch.zeros(64, 128, 1, 1), torch.zeros(64)))
    with pytest.raises(BackendUnavailable, match="runs on CUDA devices only"):
        convolution_pair(x, weights, following, residual=kept, second=branch, backend="native")


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, residual: bool, dtype: torch.dtype) -> None:
    x, weights, following, kept, branch = make(shape, "cuda", dtype)
    kept = kept if residual else None
    chunks = -(-shape[3] // 64) + -(-shape[6] // 64)
    for config in [*pair_configs(chunks, shape[5]), PairConfig(2, early=False)]:
        got = convolution_pair(x, weights, following, residual=kept, second=branch, config=config, backend="native")
        for mine, want in zip(got, exact(x, weights, following, kept, branch, got[0]), strict=True):
            rounded = float((want.to(dtype).double() - want).norm())
            assert float((mine.double() - want).norm()) <= 3 * rounded + 1e-6, config


@GPU
def test_the_same_bits_in_a_graph() -> None:
    x, weights, following, kept, _ = make(SHAPES[5], "cuda", torch.float16)
    want = convolution_pair(x, weights, following, residual=kept, backend="native", config=PairConfig(2, early=False))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            got = convolution_pair(x, weights, following, residual=kept, backend="native")
    for _ in range(200):
        for one in got:
            one.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiles_as_one_graph() -> None:
    x, weights, following, kept, _ = make((1, 4, 4, 16, 256, 64, 0, 1))

    def run(x: torch.Tensor) -> torch.Tensor:
        wide, narrow = convolution_pair(x, weights, following, residual=kept)
        return wide.mean() + narrow

    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


@GPU
def test_the_op_keeps_its_schema() -> None:
    x, weights, following, kept, _ = make((1, 4, 4, 16, 256, 64, 0, 1), "cuda", torch.float16)
    rows = [one.permute(0, 2, 3, 1).contiguous() for one in (x, kept)]
    first, then = (rows[0], weights.weight, weights.bias, rows[1], None, None, 1), (following.weight, following.bias)
    torch.library.opcheck(torch.ops.fastmetro_kernels.convolution_pair_native, (*first, *then, [2, 1]))
