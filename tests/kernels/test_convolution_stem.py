"""The fused stem: the order of its weights and its index arithmetic on the CPU, the kernel on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmetro_kernels.convolution import StemWeights, convolution_stem, lay_out_stem, pack_stem

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PITCH, CONV_COLUMNS, POSITIONS = 106, 15, 135  # of csrc/convolution/stem.cuh
SIZES = [(1, 1), (7, 5), (31, 33), (56, 60), (224, 224), (225, 223)]


def exact(x: torch.Tensor, weights: StemWeights) -> torch.Tensor:
    y = F.conv2d(x.double(), weights.weight.double(), weights.bias.double(), 2, 3).relu()
    return F.max_pool2d(y, 3, 2, 1)


def make(images: int, height: int, width: int, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * width + images)
    weight = torch.randn(64, 3, 7, 7, generator=generator) / 12
    x = torch.randn(images, 3, height, width, generator=generator).to(device, dtype)
    weights = lay_out_stem(weight.to(device, dtype), torch.randn(64, generator=generator).to(device))
    return x.to(memory_format=torch.channels_last), weights


def lane_product(patch: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """[135, 64]: what the warps of a block compute of its pixels [23, 35, 3], number by number as they read them."""
    beyond = torch.full((2 * PITCH,), torch.nan, dtype=torch.float64)
    pixels = torch.cat([F.pad(patch.flatten(1), (0, 1)).flatten(), beyond])
    out = torch.zeros(POSITIONS, 64, dtype=torch.float64)
    position = torch.arange(POSITIONS)
    first = 2 * (position // CONV_COLUMNS * PITCH + position % CONV_COLUMNS * 3)
    for half in range(2):
        for step in range(10):
            for lane in range(32):
                for which in range(2):
                    pair = 8 * step + lane % 4 + 4 * which
                    word = pair // 11 * (PITCH // 2) + pair % 11 if pair < 77 else 0
                    values = torch.stack([pixels[first + 2 * word], pixels[first + 2 * word + 1]], 1)
                    for eight in range(4):
                        weight = packed[half, step, lane, 4 * eight + 2 * which : 4 * eight + 2 * which + 2]
                        out[:, half * 32 + eight * 8 + lane // 4] += values @ weight
    return out


def test_what_the_lanes_read_is_the_convolution() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 3, 7, 7, generator=generator).double()
    patch = torch.randn(23, 35, 3, generator=generator).double()
    expected = F.conv2d(patch.permute(2, 0, 1)[None], weight, None, 2)[0].flatten(1).T
    torch.testing.assert_close(lane_product(patch, pack_stem(weight)), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size) -> None:
    x, weights = make(2, *size)
    got = convolution_stem(x, weights)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), exact(x, weights), rtol=1e-5, atol=1e-5)
    fake = torch.ops.fastmetro_kernels.convolution_stem
    shape = fake(
        x.permute(0, 2, 3, 1).contiguous().to("meta"), weights.packed.to("meta"), weights.bias.to("meta"), True
    )
    assert list(shape.permute(0, 3, 1, 2).shape) == list(got.shape)


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
    with pytest.raises(RuntimeError, match="convolution_stem"):
        convolution_stem(x.requires_grad_(), weights)


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("images", [0, 1, 3, 33])
def test_kernel(images: int, size, dtype: torch.dtype) -> None:
    """Rounded once: at most the type's unit around the exact value; the output's memory was NaN."""
    x, weights = make(images, *size, "cuda", dtype)
    want = exact(x, weights)
    poison = torch.full(want.shape, torch.nan, dtype=dtype, device="cuda")
    del poison
    got = convolution_stem(x, weights, backend="native")
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=1.5 * torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(got, convolution_stem(x, weights, backend="native", early=False))


@GPU
def test_in_a_graph_with_new_weights() -> None:
    x, weights = make(1, 224, 224, "cuda", torch.float16)
    convolution_stem(x, weights, backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = convolution_stem(x, weights, backend="native")
    weights.weight.mul_(0.5), weights.packed.copy_(pack_stem(weights.weight))
    graph.replay()
    torch.testing.assert_close(y.double(), exact(x, weights), rtol=1.5 * torch.finfo(torch.float16).eps, atol=1e-4)


@GPU
def test_not_a_number_reaches_every_window_that_sees_it() -> None:
    x, weights = make(1, 40, 40, "cuda", torch.float16)
    x[0, 1, 20, 13] = torch.nan
    seen = exact(x, weights).isnan()
    assert bool(convolution_stem(x, weights, backend="native").isnan()[seen].all())


def test_compiles_as_one_graph() -> None:
    x, weights = make(1, 20, 24)
    compiled = torch.compile(lambda x: convolution_stem(x, weights) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), convolution_stem(x, weights) + 1)


@GPU
def test_the_op_keeps_its_schema() -> None:
    x, weights = make(2, 20, 24, "cuda", torch.float16)
    rows = x.permute(0, 2, 3, 1).contiguous()
    torch.library.opcheck(torch.ops.fastmetro_kernels.convolution_stem, (rows, weights.packed, weights.bias, True))
