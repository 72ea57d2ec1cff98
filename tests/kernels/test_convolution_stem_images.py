"""Both stems of images as they come give the bits of the kernel in front and then the stem: emulated, and on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import test_convolution_double_stem as double
import test_convolution_stem as single
import torch
from stem_cases import KINDS, make_images
from test_convolution_stem import EMULATOR, GPU, HALVES, HOPPER
from torch import Tensor

from fastmetro_kernels.convolution import (
    convolution_double_stem,
    convolution_stem,
    double_stem_configs,
    stem_configs,
)


class Case(NamedTuple):
    """One of the stems: the op, its tiles, weights of a dtype on a device, and the kernel in the emulator."""

    op: Callable[..., Tensor]
    configs: tuple[Any, ...]
    make: Callable[..., tuple[Tensor, Any]]
    emulate: Callable[..., Tensor]

    def weights(self, dtype: torch.dtype, device: str = "cpu") -> Any:
        return self.make(1, 1, 1, device, dtype)[1]


STEMS = {
    "stem": Case(convolution_stem, stem_configs(), single.make, single.emulate),
    "double": Case(convolution_double_stem, double_stem_configs(), double.make, double.emulate),
}
TILES = [(name, config) for name, case in STEMS.items() for config in case.configs]
EMULATED = [("stem", stem_configs(True)[0]), *TILES]  # the tile of warpgroups, too
SIZES = [(1, 1), (7, 5), (31, 33), (9, 12), (30, 40)]
"""Widths of which none, none, none, planes and bytes only, and all are read in words."""


def same(got: Tensor, want: Tensor) -> bool:
    """Bits, shape and order."""
    return got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want)


@EMULATOR
@pytest.mark.parametrize(("name", "config"), EMULATED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_emulated(name: str, config: Any, size: tuple[int, int], kind: str) -> None:
    """Two blocks go through several tiles of three images."""
    case, images = STEMS[name], make_images(kind, 3, *size)
    for dtype in HALVES if size == (9, 12) else HALVES[:1]:
        weights = case.weights(dtype)
        got = case.emulate(images.x, weights, config, 2, **images.constants, schedule="random")
        assert same(got, case.emulate(images.made(dtype), weights, config, 2)) and bool(got.isfinite().all())


@EMULATOR
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1, 2])
def test_emulated_unaligned(name: str, kind: str, shift: int) -> None:
    """Rows of 40 pixels that begin between words."""
    case, images = STEMS[name], make_images(kind, 2, 13, 40, shift=shift)
    weights = case.weights(torch.float16)
    got = case.emulate(images.x, weights, case.configs[-1], 3, **images.constants)
    assert same(got, case.emulate(images.made(torch.float16), weights, case.configs[-1], 3))


@EMULATOR
@pytest.mark.parametrize("name", STEMS)
def test_emulated_not_a_number_stays(name: str) -> None:
    case, images = STEMS[name], make_images("planes", 1, 24, 24)
    images.x[0, 1, 12, 9] = torch.nan
    weights = case.weights(torch.float16)
    got = case.emulate(images.x, weights, case.configs[-1], 1)
    want = case.emulate(images.made(torch.float16), weights, case.configs[-1], 1)
    assert bool(want.isnan().any()) and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_reference(name: str, kind: str, dtype: torch.dtype) -> None:
    case, images = STEMS[name], make_images(kind, 2, 31, 33)
    weights = case.weights(dtype)
    got = case.op(images.x, weights, **images.constants)
    assert same(got, case.op(images.made(dtype), weights)) and got.dtype == dtype


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_numbers(name: str, kind: str) -> None:
    case, images = STEMS[name], make_images(kind, 2, 31, 33)
    weights = case.weights(torch.bfloat16)
    operator, operands = operator_of(name, weights)
    given = [None if one is None else one.to("meta") for one in images]
    got = operator(given[0], *(one.to("meta") for one in operands), tile_of(name), *given[1:])
    assert got.permute(0, 3, 1, 2).shape == case.op(images.x, weights, **images.constants).shape
    assert got.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"x must be \[N, (3, H, W|H, W, 3)\]"):
        operator(given[0].transpose(1, 3), *(one.to("meta") for one in operands), tile_of(name), *given[1:])


def operator_of(name: str, weights: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Of the native op: itself, and its operands behind the images."""
    ops = torch.ops.fastmetro_kernels
    if name == "stem":
        return ops.convolution_stem, (weights.packed, weights.bias)
    operands = (weights.packed_first, weights.first_bias, weights.packed_second, weights.second_bias)
    return ops.convolution_double_stem, operands


def tile_of(name: str) -> list[int]:
    """The native op's."""
    return list(map(int, STEMS[name].configs[-1]))


@pytest.mark.parametrize("name", STEMS)
def test_bad_input_is_named(name: str) -> None:
    case, pixels, planes = STEMS[name], make_images("bytes", 1, 8, 8), make_images("planes", 1, 8, 8)
    weights = case.weights(torch.float16)
    assert pixels.mean is not None
    with pytest.raises(ValueError, match="scale must be given for uint8 images"):
        case.op(pixels.x, weights, mean=pixels.mean)
    with pytest.raises(ValueError, match=r"mean is for uint8 images, got x of torch\.float32"):
        case.op(planes.x, weights, mean=pixels.mean)
    with pytest.raises(ValueError, match=r"x must be \[N, H, W, 3\] of uint8, got \[1, 3, 8, 8\]"):
        case.op(pixels.x.permute(0, 3, 1, 2), weights, **pixels.constants)
    with pytest.raises(ValueError, match=r"mean must be \[3\], one number for each channel, got \[1\]"):
        case.op(pixels.x, weights, mean=pixels.mean[:1], scale=pixels.scale)
    with pytest.raises(TypeError, match="mean must be one of float32, got"):
        case.op(pixels.x, weights, mean=pixels.mean.double(), scale=pixels.scale)
    with pytest.raises(TypeError, match=r"x must be one of .*uint8, got"):
        case.op(planes.x.int(), weights)
    with pytest.raises(TypeError, match=r"weights\.(weight|first) must be one of float64"):
        case.op(planes.x.double(), weights)
    with pytest.raises(RuntimeError, match="mean requires grad"):
        case.op(pixels.x, weights, mean=pixels.mean.clone().requires_grad_(), scale=pixels.scale)


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(name: str, kind: str) -> None:
    case, images = STEMS[name], make_images(kind, 1, 20, 24)
    weights = case.weights(torch.float32)
    compiled = torch.compile(lambda x: case.op(x, weights, **images.constants) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images.x), case.op(images.x, weights, **images.constants) + 1)


@GPU
@pytest.mark.parametrize(
    ("name", "config"), [*TILES, *(("stem", one) for one in stem_configs(HOPPER)[:HOPPER])], ids=str
)
@pytest.mark.parametrize("images", [0, 1, 33])
@pytest.mark.parametrize("size", [*SIZES, (224, 224), (225, 223)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernel(name: str, config: Any, images: int, size: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """The output's memory was NaN; aligned and between words, with an early start or without."""
    case, weights = STEMS[name], STEMS[name].weights(dtype, "cuda")
    for shift in (0, 1):
        given = make_images(kind, images, *size, "cuda", shift)
        want = case.op(given.made(dtype), weights, config=config, backend="native")
        for early in (True, False, True):
            torch.full(want.shape, torch.nan, dtype=dtype, device="cuda")
            tile = config._replace(early=early)
            assert same(case.op(given.x, weights, **given.constants, config=tile, backend="native"), want)


@GPU
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_other_orders_are_copied(name: str, kind: str) -> None:
    case, given = STEMS[name], make_images(kind, 2, 20, 24, "cuda")
    weights = case.weights(torch.float16, "cuda")
    want = case.op(given.x, weights, **given.constants, backend="native")
    for x in (
        given.x.transpose(1, 2).contiguous().transpose(1, 2),
        given.x.transpose(1, 3).contiguous().transpose(1, 3),
    ):
        assert same(case.op(x, weights, **given.constants, backend="native"), want)


@GPU
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_behind_the_kernel_that_makes_the_images(name: str, kind: str) -> None:
    """In a graph, where the stem starts while images and constants are still being written."""
    case, given = STEMS[name], make_images(kind, 1, 224, 224, "cuda")
    weights = case.weights(torch.float16, "cuda")
    want = case.op(given.made(torch.float16), weights, backend="native")
    sources = [one for one in given if one is not None]
    read = [torch.zeros_like(one) for one in sources]
    constants = dict(zip(("mean", "scale"), read[1:], strict=False))  # none with planes
    case.op(read[0], weights, **constants, backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one, source in zip(read[::-1], sources[::-1], strict=True):
            one.copy_(source)
        got = case.op(read[0], weights, **constants, backend="native")
    for _ in range(20):
        for one in read:
            one.zero_()
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, want)


@GPU
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_keeps_its_schema(name: str, kind: str) -> None:
    given, weights = make_images(kind, 2, 20, 24, "cuda"), STEMS[name].weights(torch.float16, "cuda")
    operator, operands = operator_of(name, weights)
    torch.library.opcheck(operator, (given.x, *operands, tile_of(name), *given[1:]))
