"""normalize_pixels against PyTorch, bit by bit on every backend, device and pair of dtypes, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fused_cases import BFLOAT, DOUBLE, FLOAT, HALF, poisoned_memory, surrounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.fused import PixelsConfig, normalize_pixels
from fastmetro_kernels.fused.inference import DTYPES, choose_backend
from fastmetro_kernels.fused.pixels import ops
from fastmetro_kernels.fused.pixels.configs import TILES, pinned, problem

BYTE = torch.uint8


@dataclass(frozen=True)
class Runner:
    """A device, backend, and pair of dtypes that can run here."""

    device: str
    backend: str
    source: torch.dtype
    dtype: torch.dtype

    def __str__(self) -> str:
        source, dtype = (str(one).removeprefix("torch.") for one in (self.source, self.dtype))
        return f"{self.device}-{self.backend}-{source}-{dtype}"

    @property
    def interpreted(self) -> bool:
        """Triton in its interpreter: about a millisecond per program, so sizes must be small."""
        return self.backend == "triton" and self.device == "cpu"


def _can_run(runner: Runner) -> bool:
    try:
        choose_backend("op", runner.backend, torch.device(runner.device), runner.dtype)
    except BackendUnavailable:
        return False
    return runner.backend == "reference" or runner.source in ops.INPUTS


_DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
_ALL = [
    Runner(device, backend, source, dtype)
    for device in _DEVICES
    for backend in ("triton", "reference")
    for source in (BYTE, *DTYPES)
    for dtype in DTYPES
]
RUNNERS = [runner for runner in _ALL if _can_run(runner)]
ONE_EACH = [runner for runner in RUNNERS if runner.source in ops.INPUTS and runner.dtype == HALF]
"""One dtype of the result per device, backend, and dtype of the pixels that the kernel takes."""

everywhere = pytest.mark.parametrize("runner", RUNNERS, ids=str)
on_each_backend = pytest.mark.parametrize("runner", ONE_EACH, ids=str)
on_triton = pytest.mark.parametrize("runner", [r for r in ONE_EACH if r.backend == "triton"], ids=str)
on_cuda = pytest.mark.parametrize(
    "runner", [r for r in ONE_EACH if r.backend == "triton" and r.device == "cuda"], ids=str
)


def pixels_of(runner: Runner, *shape: int, seed: int = 0) -> Tensor:
    """[*shape, 3] in 0..255: whole numbers, or anything between them where the dtype has it."""
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    numbers = 255 * torch.rand((*shape, 3), generator=generator, dtype=DOUBLE)
    return numbers.to(runner.device, runner.source)


def constants(runner: Runner) -> tuple[Tensor, Tensor]:
    """Different for each channel, and not exact in half precision."""
    mean = torch.tensor([123.675, 116.28, 103.53], device=runner.device)
    return mean, 1 / torch.tensor([58.395, 57.12, 57.375], device=runner.device)


def plain(pixels: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What PyTorch makes of them, in four calls."""
    return ((pixels.float() - mean) * scale).to(dtype).permute(0, 3, 1, 2)


def check(runner: Runner, pixels: Tensor, **options: Any) -> Tensor:
    """The result, which has the bits of PyTorch's and lies in channels_last order."""
    mean, scale = constants(runner)
    with poisoned_memory():
        got = normalize_pixels(pixels, mean, scale, runner.dtype, backend=runner.backend, **options)
    assert got.dtype == runner.dtype and got.permute(0, 2, 3, 1).is_contiguous()
    torch.testing.assert_close(got, plain(pixels, mean, scale, runner.dtype), rtol=0, atol=0, equal_nan=True)
    return got


SMALL = [(1, 1, 1), (2, 3, 5), (1, 3, 85), (1, 16, 16), (3, 5, 7), (2, 33, 31), (0, 5, 7), (2, 0, 7)]
LARGE = [(1, 224, 224), (32, 224, 224), (256, 224, 224), (3, 223, 225)]


@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=lambda sizes: "x".join(map(str, sizes)))
@everywhere
def test_bits_of_pytorch(runner: Runner, sizes: tuple[int, int, int]) -> None:
    if sizes in LARGE[1:] and (runner.device == "cpu" or runner.backend == "reference"):
        pytest.skip("sizes for a GPU's kernel")
    check(runner, pixels_of(runner, *sizes))


@everywhere
def test_every_byte_in_every_channel(runner: Runner) -> None:
    values = torch.arange(256, device=runner.device).to(runner.source)
    check(runner, values[None, :, None, None].expand(1, -1, 5, 3))


@on_each_backend
def test_random_sizes(runner: Runner) -> None:
    @settings(max_examples=8 if runner.interpreted else 40)
    @given(sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 40)))
    def search(sizes: tuple[int, int, int]) -> None:
        check(runner, pixels_of(runner, *sizes))

    search()


@pytest.mark.parametrize("tile", TILES, ids=str)
@on_triton
def test_every_tile(runner: Runner, tile: PixelsConfig) -> None:
    """More than one program, the last incomplete."""
    check(runner, pixels_of(runner, 1, 2, tile.block - 1), config=tile)


@on_each_backend
def test_any_strides(runner: Runner) -> None:
    pixels = pixels_of(runner, 3, 9, 10)
    check(runner, pixels[:1].expand(3, -1, -1, -1))
    check(runner, pixels.transpose(1, 2))
    check(runner, pixels[:, ::2, 1:])
    check(runner, pixels.flip(3))
    check(runner, pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))  # from [B, 3, H, W]
    check(runner, pixels.flatten()[1:-2].view(1, 1, -1, 3))  # not on a border of 16 bytes
    if runner.source != BYTE:
        assert bool(check(runner, surrounded(pixels)).isfinite().all())


@on_each_backend
def test_constants_of_any_strides(runner: Runner) -> None:
    pixels, (mean, scale) = pixels_of(runner, 2, 5, 7), constants(runner)
    expected = plain(pixels, mean, scale, runner.dtype)
    pairs = torch.stack([mean, scale], 1)
    assert torch.equal(normalize_pixels(pixels, *pairs.unbind(1), runner.dtype, backend=runner.backend), expected)
    one = mean[:1].expand(3)
    got = normalize_pixels(pixels, one, one, runner.dtype, backend=runner.backend)
    assert torch.equal(got, plain(pixels, one, one, runner.dtype))


@everywhere
def test_nan_and_infinity_stay_in_their_number(runner: Runner) -> None:
    if runner.source == BYTE:
        pytest.skip("bytes have neither")
    pixels = pixels_of(runner, 2, 9, 10)
    pixels[1, 3, 5, 2] = torch.nan
    pixels[0, 2, 4, 0] = torch.inf
    got = check(runner, pixels)
    assert got.isnan().nonzero().tolist() == [[1, 2, 3, 5]]
    assert got.isinf().nonzero().tolist() == [[0, 0, 2, 4]]


@on_triton
def test_opcheck(runner: Runner) -> None:
    pixels, numbers = pixels_of(runner, 2, 5, 7), constants(runner)
    torch.library.opcheck(ops.normalize_pixels_triton, (pixels, *numbers, HALF, ()))
    torch.library.opcheck(ops.normalize_pixels_triton, (pixels.transpose(1, 2), *numbers, FLOAT, (256, 2)))
    for arguments, message in (
        ((pixels[0], *numbers, HALF, ()), "pixels must be"),
        ((pixels.half(), *numbers, HALF, ()), "uint8 or float32, got torch.float16"),
        ((pixels, numbers[0][:2], numbers[1], HALF, ()), "mean must be float32"),
        ((pixels, numbers[0], numbers[1].half(), HALF, ()), "scale must be float32"),
        ((pixels, *numbers, DOUBLE, ()), "dtype must be float16"),
        ((pixels, *numbers, HALF, (3, 4)), "block must be one of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.normalize_pixels_triton(*arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@on_triton
def test_compiles_without_graph_breaks(runner: Runner, dynamic: bool) -> None:
    torch._dynamo.reset()
    mean, scale = constants(runner)

    def block(pixels: Tensor) -> Tensor:
        return 2 * normalize_pixels(pixels.flip(1), mean, scale + 1, runner.dtype, backend=runner.backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        pixels = pixels_of(runner, batch, 5, 7)
        got, expected = compiled(pixels), block(pixels)
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@on_cuda
def test_captured_in_a_cuda_graph(runner: Runner) -> None:
    """Launches that start early, one after the other, between kernels that write their input: pixels and constants."""
    numbers = pixels_of(runner, 4, 224, 224)
    mean, scale = constants(runner)
    normalize_pixels(numbers, mean, scale, runner.dtype)

    def steps() -> list[Tensor]:
        found = []
        pixels, centre = numbers, mean
        for _ in range(4):
            pixels, centre = pixels.flip(1), centre + 1
            found.append(normalize_pixels(pixels, centre, scale, runner.dtype))
        return found

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for seed in range(3):
        numbers.copy_(pixels_of(runner, 4, 224, 224, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        pixels = numbers
        for index, got in enumerate(captured):
            pixels = pixels.flip(1)
            assert torch.equal(got, plain(pixels, mean + (index + 1), scale, runner.dtype))


@on_cuda
def test_more_numbers_than_32_bits_count(runner: Runner) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs about 20 GB of memory on the device")
    if runner.source != BYTE:
        pytest.skip("bytes are enough")
    pixels = torch.zeros(14300, 224, 224, 3, dtype=BYTE, device=runner.device)
    assert pixels.numel() > 2**31
    pixels[-3:] = pixels_of(runner, 3, 224, 224)
    mean, scale = constants(runner)
    got = normalize_pixels(pixels, mean, scale, HALF, backend=runner.backend)
    assert torch.equal(got[-3:], plain(pixels[-3:], mean, scale, HALF))
    assert torch.equal(got[0], plain(pixels[:1], mean, scale, HALF)[0])


PIXELS, THREE = torch.zeros(2, 5, 7, 3, dtype=BYTE), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((PIXELS.numpy(), THREE, THREE, HALF), {}, TypeError, "pixels must be a tensor, got ndarray"),
        ((PIXELS.int(), THREE, THREE, HALF), {}, TypeError, "pixels must be one of uint8, .*got torch.int32"),
        ((PIXELS[0], THREE, THREE, HALF), {}, ValueError, r"pixels must be \[B, H, W, 3\], got \[5, 7, 3\]"),
        ((PIXELS[..., :2], THREE, THREE, HALF), {}, ValueError, r"pixels must be \[B, H, W, 3\], got \[2, 5, 7, 2\]"),
        ((PIXELS, 0.5, THREE, HALF), {}, TypeError, "mean must be a tensor, got float"),
        ((PIXELS, THREE, THREE.double(), HALF), {}, TypeError, "scale must be one of float32, got torch.float64"),
        ((PIXELS, THREE[:2], THREE, HALF), {}, ValueError, r"mean must be \[3\].*got \[2\]"),
        ((PIXELS, THREE, THREE[None], HALF), {}, ValueError, r"scale must be \[3\].*got \[1, 3\]"),
        ((PIXELS, THREE, THREE.to("meta"), HALF), {}, ValueError, "scale must be on cpu, got meta"),
        ((PIXELS, THREE, THREE, torch.int8), {}, TypeError, "dtype must be one of float32.*got torch.int8"),
        ((PIXELS, THREE, THREE, "half"), {}, TypeError, "dtype must be one of float32.*got 'half'"),
        ((PIXELS, THREE, THREE, HALF), {"config": (256, 4)}, TypeError, "config must be a PixelsConfig, got tuple"),
        ((PIXELS, THREE, THREE, HALF), {"config": PixelsConfig(512, 4)}, ValueError, "block must be one of 256, 1024"),
        ((PIXELS, THREE, THREE, HALF), {"backend": "apex"}, ValueError, "backend='apex' is not known"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize_pixels(*arguments, **options)


@pytest.mark.parametrize("name", ["pixels", "mean", "scale"])
def test_gradients_are_refused(name: str) -> None:
    tensors = {"pixels": PIXELS.float(), "mean": THREE, "scale": THREE}
    tensors[name] = tensors[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"for inference.*{name} requires grad"):
        normalize_pixels(**tensors, dtype=HALF)
    with torch.no_grad():
        assert not normalize_pixels(**tensors, dtype=HALF).requires_grad


def test_backends_say_why_not() -> None:
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        normalize_pixels(PIXELS, THREE, THREE, DOUBLE, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"bfloat16|CPU tensors only in the interpreter"):
        normalize_pixels(PIXELS, THREE, THREE, BFLOAT, backend="triton")


@on_triton
def test_the_kernel_takes_bytes_and_float32(runner: Runner) -> None:
    mean, scale = constants(runner)
    pixels = PIXELS.to(runner.device, HALF)
    with pytest.raises(TypeError, match=r"uint8 or float32 with backend='triton', got torch\.float16"):
        normalize_pixels(pixels, mean, scale, HALF, backend="triton")
    assert torch.equal(normalize_pixels(pixels, mean, scale, HALF), plain(pixels, mean, scale, HALF))


def test_pinned_tiles() -> None:
    for tile in (*TILES, *(pinned(3 * 10**digits) for digits in range(10))):
        assert problem(tile) is None and tile.block % 3 == 1
    image = 3 * 224 * 224
    assert image // (3 * pinned(image).block) >= 132
    assert pinned(256 * image).block == 1024
