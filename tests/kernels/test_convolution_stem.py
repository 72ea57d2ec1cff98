"""The fused stem against float64: its order of weights, the kernel in the emulator, and on GPUs where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulation import build
from stem_cases import numbered, source_of
from torch import Tensor

from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.convolution import StemConfig, StemWeights, convolution_stem, lay_out_stem
from fastmetro_kernels.convolution.stem import PACKED, choose_stem, pack_stem, stem_configs
from fastmetro_kernels.convolution.stem_images import image_size, kernel_images

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
EMULATOR = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
HALVES = (torch.float16, torch.bfloat16)
SIZES = [(1, 1), (7, 5), (31, 33), (224, 224), (225, 223)]


def exact(x: Tensor, weights: StemWeights, pooled: bool = True) -> Tensor:
    y = F.conv2d(x.double(), weights.weight.double(), weights.bias.double(), 2, 3)
    return F.max_pool2d(y.relu(), 3, 2, 1) if pooled else y


def make(images: int, height: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(height * width + images)
    weight = torch.randn(64, 3, 7, 7, generator=generator) / 12
    x = torch.randn(images, 3, height, width, generator=generator).to(device, dtype)
    weights = lay_out_stem(weight.to(device, dtype), torch.randn(64, generator=generator).to(device))
    return x.to(memory_format=torch.channels_last), weights


def check(got: Tensor, want: Tensor) -> None:
    """Every number is right to one rounding and the sums' error in float32."""
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=0.51 * torch.finfo(got.dtype).eps, atol=1e-5, equal_nan=True)


def emulate(
    x: Tensor,
    weights: StemWeights,
    config: StemConfig,
    most_blocks: int,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    pooled: bool = True,
    **options: object,
) -> Tensor:
    harness = build.build_harness(Path(build.__file__).with_name("stem_harness.cpp"))
    dtype = weights.packed.dtype
    pixels, (height, width) = kernel_images(x, dtype), image_size(x)
    part = 4 if pooled else 2
    out = torch.full((len(x), -(-height // part), -(-width // part), 64), torch.nan, dtype=dtype)
    read = {"x": pixels, "mean": mean, "scale": scale, "weight": weights.packed, "bias": weights.bias}
    harness.run(
        "run_stem",
        *(*read.values(), out, len(x), height, width, config.height, config.width, most_blocks),
        *(config.warpgroups, source_of(x), dtype == torch.bfloat16, pooled),
        reads={name: tensor for name, tensor in read.items() if tensor is not None},
        writes={"out": out},
        **({"races": "by_barriers"} if config.warpgroups else {}),  # groups wait for themselves
        **options,
    )
    return out.permute(0, 3, 1, 2)


@EMULATOR
@pytest.mark.parametrize("config", stem_configs(True), ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (31, 33), (30, 40)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_emulated(config: StemConfig, size: tuple[int, int], dtype: torch.dtype) -> None:
    """A width of 40 takes the copies of 16 bytes, the others single numbers; two blocks go through several tiles."""
    x, weights = make(2, *size, dtype=dtype)
    check(emulate(x, weights, config, most_blocks=2, schedule="random"), exact(x, weights))


@EMULATOR
@pytest.mark.parametrize("config", stem_configs(True), ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (31, 33), (30, 40)], ids=str)
def test_the_convolution_alone_emulated(config: StemConfig, size: tuple[int, int]) -> None:
    x, weights = make(2, *size, dtype=torch.bfloat16)
    got = emulate(x, weights, config, most_blocks=2, schedule="random", pooled=False)
    check(got, exact(x, weights, pooled=False))


@EMULATOR
@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_emulated_groups_of_one_block(dtype: torch.dtype, schedule: str) -> None:
    """Each goes through several tiles."""
    x, weights = make(2, 65, 70, dtype=dtype)
    config = StemConfig(7, 8, warpgroups=True)
    check(emulate(x, weights, config, most_blocks=1, schedule=schedule, seed=1), exact(x, weights))


@EMULATOR
def test_emulated_not_a_number_stays() -> None:
    x, weights = make(1, 24, 24, dtype=torch.float16)
    x[0, 1, 12, 9] = torch.nan
    seen = exact(x, weights).isnan()
    assert bool(seen.any()) and bool(emulate(x, weights, stem_configs()[-1], most_blocks=1).isnan()[seen].all())


def test_order_of_the_weights() -> None:
    """Each weight is there once, for one lane; the places beyond the 147 of a channel hold zeros."""
    weight = numbered(64, 3, 7, 7)
    packed = pack_stem(weight)
    assert packed.shape == PACKED and packed.is_contiguous()
    assert int((packed == 0).sum()) == 64 * (160 - 147)
    assert torch.equal(packed[packed != 0].sort().values, weight.flatten().sort().values)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size: tuple[int, int]) -> None:
    x, weights = make(2, *size)
    got = convolution_stem(x, weights)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), exact(x, weights), rtol=1e-5, atol=1e-5)
    rows = x.permute(0, 2, 3, 1).contiguous().to("meta", torch.float16)
    packed = weights.packed.to("meta", torch.float16)
    op = torch.ops.fastmetro_kernels.convolution_stem
    given = rows, packed, weights.bias.to("meta"), [4, 4, 1, 0]
    assert op(*given).permute(0, 3, 1, 2).shape == got.shape
    alone = convolution_stem(x, weights, pooled=False)
    assert alone.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(alone.double(), exact(x, weights, pooled=False), rtol=1e-5, atol=1e-5)
    assert op(*given, pooled=False).permute(0, 3, 1, 2).shape == alone.shape


def test_choice() -> None:
    """Products of warpgroups, where there are, make the largest tile faster."""
    assert choose_stem(3, 56, 56, warpgroups=True) == StemConfig(7, 8, warpgroups=True)
    assert choose_stem(1, 56, 56, warpgroups=True) == StemConfig(4, 4)
    assert choose_stem(1, 56, 56) == StemConfig(4, 4) and choose_stem(32, 56, 56) == StemConfig(7, 8)
    assert choose_stem(2, 56, 56) == StemConfig(4, 8) and choose_stem(1, 1, 1) == StemConfig(4, 4)


def test_bad_input_is_named() -> None:
    x, weights = make(1, 8, 8)
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\], got \[1, 4, 8, 8\]"):
        convolution_stem(torch.zeros(1, 4, 8, 8), weights)
    with pytest.raises(ValueError, match=r"weight must be \[64, 3, 7, 7\], got \[32, 3, 7, 7\]"):
        lay_out_stem(torch.zeros(32, 3, 7, 7), torch.zeros(32))
    with pytest.raises(ValueError, match=r"bias must be \[64\], got \[3\]"):
        lay_out_stem(torch.zeros(64, 3, 7, 7), torch.zeros(3))
    with pytest.raises(TypeError, match="weights must come from lay_out_stem, got tuple"):
        convolution_stem(x, tuple(weights))
    with pytest.raises(ValueError, match=r"config must be a tile of 7 x 8, .* got \(5, 5, True, False\)"):
        convolution_stem(x, weights, config=StemConfig(5, 5))
    with pytest.raises(ValueError, match=r"or of 7 x 8 with warpgroups, got \(4, 4, True, True\)"):
        convolution_stem(x, weights, config=StemConfig(4, 4, warpgroups=True))
    with pytest.raises(TypeError, match=r"weights\.weight must be"):
        convolution_stem(x.half(), weights)
    with pytest.raises(BackendUnavailable, match="runs on CUDA devices only"):
        convolution_stem(x, weights, backend="native")
    with pytest.raises(RuntimeError, match="convolution_stem"):
        convolution_stem(x.requires_grad_(), weights)


@GPU
@pytest.mark.parametrize("config", stem_configs(HOPPER), ids=str)
@pytest.mark.parametrize("images", [0, 1, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernel(config: StemConfig, images: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """The output's memory was NaN; the bits are the same every time, with an early start or without."""
    x, weights = make(images, *size, "cuda", dtype)
    want = exact(x, weights)
    first = None
    for early in (True, False, True):
        torch.full(want.shape, torch.nan, dtype=dtype, device="cuda")
        got = convolution_stem(x, weights, config=config._replace(early=early), backend="native")
        check(got, want)
        assert first is None or torch.equal(got, first)
        first = got


@GPU
@pytest.mark.parametrize("config", stem_configs(HOPPER), ids=str)
@pytest.mark.parametrize("images", [1, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_convolution_alone(config: StemConfig, images: int, size: tuple[int, int]) -> None:
    x, weights = make(images, *size, "cuda", torch.bfloat16)
    want = exact(x, weights, pooled=False)
    for early in (True, False):
        torch.full(want.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
        got = convolution_stem(x, weights, pooled=False, config=config._replace(early=early), backend="native")
        check(got, want)


@GPU
@pytest.mark.parametrize("config", stem_configs(HOPPER), ids=str)
def test_in_a_graph_with_new_weights(config: StemConfig) -> None:
    x, weights = make(2, 224, 224, "cuda", torch.float16)
    convolution_stem(x, weights, config=config, backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = convolution_stem(x, weights, config=config, backend="native")
    for _ in range(2):
        weights.weight.mul_(0.5), weights.packed.copy_(pack_stem(weights.weight))
        torch.cuda.synchronize()
        for _ in range(10):
            got.fill_(torch.nan)
            graph.replay()
            check(got, exact(x, weights))


@GPU
@pytest.mark.parametrize("config", stem_configs(HOPPER), ids=str)
def test_not_a_number_reaches_every_window_that_sees_it(config: StemConfig) -> None:
    x, weights = make(1, 40, 40, "cuda", torch.float16)
    x[0, 1, 20, 13] = torch.nan
    seen = exact(x, weights).isnan()
    assert bool(convolution_stem(x, weights, config=config, backend="native").isnan()[seen].all())


def test_compiles_as_one_graph() -> None:
    x, weights = make(1, 20, 24)
    compiled = torch.compile(lambda x: convolution_stem(x, weights) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), convolution_stem(x, weights) + 1)


@GPU
def test_the_op_keeps_its_schema() -> None:
    x, weights = make(2, 20, 24, "cuda", torch.float16)
    rows = x.permute(0, 2, 3, 1).contiguous()
    torch.library.opcheck(
        torch.ops.fastmetro_kernels.convolution_stem, (rows, weights.packed, weights.bias, [4, 4, 1, 0])
    )
