"""HRNet's fused stem against float64: its order of weights, the kernel in the emulator, and on GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulation import build
from stem_cases import numbered, source_of
from torch import Tensor

from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.convolution import (
    DoubleStemConfig,
    DoubleStemWeights,
    choose_double_stem,
    convolution_double_stem,
    double_stem_configs,
    lay_out_double_stem,
    pack_double_stem,
)
from fastmetro_kernels.convolution.double_stem import FIRST_PACKED, SECOND_PACKED
from fastmetro_kernels.convolution.stem_images import image_size, kernel_images

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EMULATOR = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
HALVES = (torch.float16, torch.bfloat16)
SIZES = [(1, 1), (7, 5), (31, 33), (224, 224), (225, 223)]


def exact(x: Tensor, weights: DoubleStemWeights) -> tuple[Tensor, Tensor]:
    """Float64, with the first result rounded as it is; and how far a rounding the other way may take the second."""
    first = F.conv2d(x.double(), weights.first.double(), weights.first_bias.double(), 2, 1).relu()
    middle = first.to(x.dtype).double()
    want = F.conv2d(middle, weights.second.double(), weights.second_bias.double(), 2, 1).relu()
    step = torch.finfo(x.dtype).eps
    other = F.conv2d(step * middle.square(), weights.second.double().square(), None, 2, 1).sqrt() * step**0.5
    return want, other


def make(images: int, height: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(height * width + images)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x = normal(images, 3, height, width).to(memory_format=torch.channels_last)
    first, second = normal(64, 3, 3, 3) / 5, normal(64, 64, 3, 3) / 24
    return x, lay_out_double_stem(first, normal(64).float(), second, normal(64).float())


def check(got: Tensor, x: Tensor, weights: DoubleStemWeights) -> None:
    """Every number is right to its rounding and that of what it is made of."""
    want, other = exact(x, weights)
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    allowed = 0.51 * torch.finfo(got.dtype).eps * want.abs() + 2 * other + 1e-4
    assert bool(((got.double() - want).abs() <= allowed).all()), float(((got.double() - want).abs() - allowed).max())


def emulate(
    x: Tensor,
    weights: DoubleStemWeights,
    config: DoubleStemConfig,
    most_blocks: int,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    **options: object,
) -> Tensor:
    harness = build.build_harness(Path(build.__file__).with_name("double_stem_harness.cpp"))
    dtype = weights.packed_first.dtype
    pixels, (height, width) = kernel_images(x, dtype), image_size(x)
    out = torch.full((len(x), (height + 3) // 4, (width + 3) // 4, 64), torch.nan, dtype=dtype)
    packed = (weights.packed_first, weights.first_bias, weights.packed_second, weights.second_bias)
    names = ("x", "mean", "scale", "first", "first_bias", "second", "second_bias")
    read = dict(zip(names, (pixels, mean, scale, *packed), strict=True))
    harness.run(
        "run_double_stem",
        *(*read.values(), out, len(x), height, width, config.height, most_blocks),
        *(source_of(x), dtype == torch.bfloat16),
        reads={name: tensor for name, tensor in read.items() if tensor is not None},
        writes={"out": out},
        **options,
    )
    return out.permute(0, 3, 1, 2)


@EMULATOR
@pytest.mark.parametrize("config", double_stem_configs(), ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (31, 33), (30, 40)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_emulated(config: DoubleStemConfig, size: tuple[int, int], dtype: torch.dtype) -> None:
    """A width of 40 takes the copies of 16 bytes, the others single numbers; a block goes through several tiles."""
    x, weights = make(2, *size, dtype=dtype)
    check(emulate(x, weights, config, most_blocks=1, schedule="random"), x, weights)


@EMULATOR
def test_emulated_not_a_number_stays() -> None:
    x, weights = make(1, 24, 24, dtype=torch.float16)
    x[0, 1, 12, 9] = torch.nan
    seen = exact(x, weights)[0].isnan()
    assert bool(seen.any()) and bool(emulate(x, weights, double_stem_configs()[-1], most_blocks=1).isnan()[seen].all())


def test_order_of_the_weights() -> None:
    """Each weight is there once, for one lane; the places beyond the 27 of a channel hold zeros."""
    first, second = numbered(64, 3, 3, 3), numbered(64, 64, 3, 3)
    packed = pack_double_stem(first, second)
    assert [one.shape for one in packed] == [FIRST_PACKED, SECOND_PACKED]
    assert int((packed[0] == 0).sum()) == 64 * (32 - 27)
    for one, weight in zip(packed, (first, second), strict=True):
        assert one.is_contiguous() and torch.equal(one[one != 0].sort().values, weight.flatten().sort().values)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size: tuple[int, int]) -> None:
    x, weights = make(2, *size)
    got = convolution_double_stem(x, weights)
    check(got, x, weights)
    rows = x.permute(0, 2, 3, 1).contiguous().to("meta", torch.float16)
    packed = (weights.packed_first, weights.first_bias, weights.packed_second, weights.second_bias)
    op = torch.ops.fastmetro_kernels.convolution_double_stem
    numbers = [one.to("meta", torch.float32 if one.dim() == 1 else torch.float16) for one in packed]
    shape = op(rows, *numbers, [4, 1]).permute(0, 3, 1, 2).shape
    assert shape == got.shape


def test_choice() -> None:
    assert choose_double_stem(1, 56, 56) == DoubleStemConfig(4) and choose_double_stem(32, 56, 56).height == 8


def test_bad_input_is_named() -> None:
    x, weights = make(1, 8, 8)
    first, second, bias = weights.first, weights.second, weights.first_bias
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\], got \[1, 4, 8, 8\]"):
        convolution_double_stem(torch.zeros(1, 4, 8, 8), weights)
    with pytest.raises(ValueError, match=r"second must be \[64, 64, 3, 3\], got \[64, 3, 3, 3\]"):
        pack_double_stem(first, first)
    with pytest.raises(ValueError, match=r"second_bias must be \[64\], got \[3\]"):
        lay_out_double_stem(first, bias, second, torch.zeros(3))
    with pytest.raises(TypeError, match="weights must come from lay_out_double_stem, got tuple"):
        convolution_double_stem(x, tuple(weights))
    with pytest.raises(ValueError, match="config must be a tile of 8 or 4 rows, got 5"):
        convolution_double_stem(x, weights, config=DoubleStemConfig(5))
    with pytest.raises(TypeError, match=r"weights\.first must be"):
        convolution_double_stem(x.half(), weights)
    with pytest.raises(BackendUnavailable, match="runs on CUDA devices only"):
        convolution_double_stem(x, weights, backend="native")
    with pytest.raises(RuntimeError, match="convolution_double_stem"):
        convolution_double_stem(x.requires_grad_(), weights)


@GPU
@pytest.mark.parametrize("config", double_stem_configs(), ids=str)
@pytest.mark.parametrize("images", [0, 1, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernel(config: DoubleStemConfig, images: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """The output's memory was NaN; the bits are the same every time, with an early start or without."""
    x, weights = make(images, *size, "cuda", dtype)
    first = None
    for early in (True, False, True):
        torch.full((images, 64, *((one + 3) // 4 for one in size)), torch.nan, dtype=dtype, device="cuda")
        got = convolution_double_stem(x, weights, config=config._replace(early=early), backend="native")
        check(got, x, weights)
        assert first is None or torch.equal(got, first)
        first = got


@GPU
@pytest.mark.parametrize("config", double_stem_configs(), ids=str)
def test_in_a_graph_with_new_weights(config: DoubleStemConfig) -> None:
    x, weights = make(2, 224, 224, "cuda", torch.float16)
    convolution_double_stem(x, weights, config=config, backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = convolution_double_stem(x, weights, config=config, backend="native")
    for _ in range(2):
        weights.first.mul_(0.5), weights.second.mul_(1.5)
        packed = pack_double_stem(weights.first, weights.second)
        weights.packed_first.copy_(packed[0]), weights.packed_second.copy_(packed[1])
        torch.cuda.synchronize()
        for _ in range(10):
            got.fill_(torch.nan)
            graph.replay()
            check(got, x, weights)


def test_compiles_as_one_graph() -> None:
    x, weights = make(1, 20, 24)
    compiled = torch.compile(lambda x: convolution_double_stem(x, weights) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), convolution_double_stem(x, weights) + 1)


@GPU
def test_the_op_keeps_its_schema() -> None:
    x, weights = make(2, 20, 24, "cuda", torch.float16)
    rows = x.permute(0, 2, 3, 1).contiguous()
    packed = (weights.packed_first, weights.first_bias, weights.packed_second, weights.second_bias)
    torch.library.opcheck(torch.ops.fastmetro_kernels.convolution_double_stem, (rows, *packed, [4, 1]))
