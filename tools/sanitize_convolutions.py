"""The convolutions' cases of `sanitize_cases.py`. There is no kernel for CPUs, where the reference runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmetro_kernels.convolution import (
    ConvolutionConfig,
    DoubleStemConfig,
    StemConfig,
    configs,
    convolution,
    convolution_double_stem,
    convolution_ending,
    convolution_pair,
    convolution_stem,
    lay_out,
    lay_out_double_stem,
    lay_out_stem,
    stem_configs,
)
from fastmetro_kernels.convolution.ending_configs import FOLLOWED, FOLLOWING, JOINED, MODES
from tools.sanitize_common import BFLOAT, FLOAT, HALF, TOLERANCE, compare, written_results


@dataclass(frozen=True)
class Convolution:
    """One call of `convolution` with one tile; there is no kernel for CPUs, where the reference runs."""

    size: tuple[int, int, int]  # images, height, width
    channels: tuple[int, int]  # in and out
    config: ConvolutionConfig
    kernel: int = 3
    stride: int = 1
    dtype: torch.dtype = HALF
    residual: bool = False
    second: bool = False
    scale: int = 1
    late: bool = False

    def run(self, backend: str, device: str) -> None:
        got = self._result(self.dtype, "reference" if device == "cpu" else backend, device)
        compare("out", got, self._result(FLOAT, "reference", "cpu"), TOLERANCE[self.dtype])

    def _result(self, dtype: torch.dtype, backend: str, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.kernel)

        def normal(*size: int, scale: float = 1.0) -> Tensor:  # of the case's type, in whatever type it is computed
            return (scale * torch.randn(size, generator=generator)).to(self.dtype).to(device, dtype)

        (n, h, w), (c, k), taps = self.size, self.channels, self.kernel
        p, q = (h - 1) // self.stride + 1, (w - 1) // self.stride + 1
        more = (normal(k, 48, 1, 1, scale=48**-0.5), normal(k), 2) if self.second else None
        weights = lay_out(normal(k, c, taps, taps, scale=(c * taps**2) ** -0.5), normal(k), self.stride, second=more)
        out = (p * self.scale, q * self.scale, k)
        images = [normal(n, *size) for size in ((h, w, c), out, (2 * p, 2 * q - 1, 48))]
        x, kept, branch = (one.permute(0, 3, 1, 2) for one in images)
        added = {"residual": kept if self.residual else None, "second": branch if more else None}
        options = {"late": self.late, "scale": self.scale, "config": self.config, "backend": backend}
        return convolution(x, weights, **options, **added).cpu()


@dataclass(frozen=True)
class Pair:
    """One call of `convolution_pair`."""

    size: tuple[int, int, int]  # images, height, width
    channels: tuple[int, int, int]  # in, between, out
    second: bool = False

    def run(self, backend: str, device: str) -> None:
        got = self._results(HALF, "reference" if device == "cpu" else backend, device)
        for name, a, b in zip(("wide", "out"), got, self._results(FLOAT, "reference", "cpu"), strict=True):
            compare(name, a, b, TOLERANCE[HALF])

    def _results(self, dtype: torch.dtype, backend: str, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator)).half().to(device, dtype)

        (n, h, w), (c, k, m) = self.size, self.channels
        more = (normal(k, 48, 1, 1, scale=48**-0.5), normal(k), 2) if self.second else None
        weights = lay_out(normal(k, c, 1, 1, scale=c**-0.5), normal(k), second=more)
        following = lay_out(normal(m, k, 1, 1, scale=k**-0.5), normal(m))
        images = [normal(n, *size).permute(0, 3, 1, 2) for size in ((h, w, c), (h, w, k), (2 * h, 2 * w, 48))]
        added = {"second": images[2]} if self.second else {"residual": images[1]}
        return [one.cpu() for one in convolution_pair(images[0], weights, following, backend=backend, **added)]


@dataclass(frozen=True)
class Ending:
    """One call of `convolution_ending`, in one of its modes."""

    size: tuple[int, int, int]  # images, height, width
    mode: str
    early: bool = True
    dtype: torch.dtype = HALF

    def run(self, backend: str, device: str) -> None:
        got = self._results(self.dtype, "reference" if device == "cpu" else backend, device)
        want = self._results(FLOAT, "reference", "cpu")
        for name, a, b in zip(("wide", "narrow")[: len(got)], got, want, strict=True):
            compare(name, a, b, TOLERANCE[self.dtype])

    def _results(self, dtype: torch.dtype, backend: str, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)

        def normal(*size: int, scale: float = 1.0) -> Tensor:  # of the case's type, in whatever type it is computed
            return (scale * torch.randn(size, generator=generator)).to(self.dtype).to(device, dtype)

        n, h, w = self.size
        weights = lay_out(normal(64, 64, 3, 3, scale=1 / 24), normal(64))
        branch = (normal(256, 64, 1, 1, scale=1 / 8), None, 1) if self.mode == JOINED else None
        last = lay_out(normal(256, 64, 1, 1, scale=1 / 8), normal(256), second=branch)
        outputs = FOLLOWING[self.mode]
        following = lay_out(normal(outputs, 256, 1, 1, scale=1 / 16), normal(outputs)) if outputs else None
        x, shortcut = (normal(n, h, w, c).permute(0, 3, 1, 2) for c in (64, 64 if branch else 256))
        both = (None, shortcut) if branch else (shortcut, None)
        with written_results():
            found = convolution_ending(x, weights, last, following, *both, early=self.early, backend=backend)
        return [one.cpu() for one in found if one is not None]


def _images(size: tuple[int, int, int], kind: torch.dtype, own: torch.dtype, device: str) -> dict[str, Tensor]:
    """What a stem takes: images of half precision in the type that the case has, float32 planes, or bytes."""
    generator = torch.Generator().manual_seed(4)
    n, h, w = size
    if kind == torch.uint8:
        pixels = torch.randint(256, (n, h, w, 3), generator=generator, dtype=torch.uint8)
        mean, scale = torch.tensor([[124.0, 116.0, 104.0], [1 / 64] * 3])  # of which all results are exact
        return {name: one.to(device) for name, one in (("x", pixels), ("mean", mean), ("scale", scale))}
    x = torch.randn(n, h, w, 3, generator=generator).half().to(device, FLOAT if kind == FLOAT else own)
    planes = x.permute(0, 3, 1, 2)
    return {"x": planes.contiguous() if kind == FLOAT else planes}


@dataclass(frozen=True)
class Stem:
    """One call of `convolution_stem`."""

    size: tuple[int, int, int]  # images, height, width
    config: StemConfig
    kind: torch.dtype = HALF  # of the images
    pooled: bool = True

    def run(self, backend: str, device: str) -> None:
        got = self._result(HALF, "reference" if device == "cpu" else backend, device)
        compare("out", got, self._result(FLOAT, "reference", "cpu"), TOLERANCE[HALF])

    def _result(self, dtype: torch.dtype, backend: str, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(64, 3, 7, 7, generator=generator) / 12
        weights = lay_out_stem(weight.half().to(device, dtype), torch.randn(64, generator=generator).to(device))
        images = _images(self.size, self.kind, dtype, device)
        options = {"pooled": self.pooled, "config": self.config, "backend": backend}
        return convolution_stem(weights=weights, **options, **images).cpu()


@dataclass(frozen=True)
class DoubleStem:
    """One call of `convolution_double_stem`."""

    size: tuple[int, int, int]  # images, height, width
    config: DoubleStemConfig
    kind: torch.dtype = HALF  # of the images

    def run(self, backend: str, device: str) -> None:
        got = self._result(HALF, "reference" if device == "cpu" else backend, device)
        compare("out", got, self._result(FLOAT, "reference", "cpu"), TOLERANCE[HALF])

    def _result(self, dtype: torch.dtype, backend: str, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(64, depth, 3, 3, generator=generator) / (9 * depth) ** 0.5 for depth in (3, 64)]
        first, second = (weight.half().to(device, dtype) for weight in weights)
        biases = [torch.randn(64, generator=generator).to(device) for _ in range(2)]
        images = _images(self.size, self.kind, dtype, device)
        laid_out = lay_out_double_stem(first, biases[0], second, biases[1])
        return convolution_double_stem(weights=laid_out, config=self.config, backend=backend, **images).cpu()


Case = Convolution | Pair | Ending | Stem | DoubleStem


def _cases() -> Iterator[Case]:
    """Every width of a tile and every split, with rings that wrap around, at sizes that fill no tile."""
    for columns in configs.COLUMNS:
        for split in configs.SPLITS:
            yield Convolution((3, 7, 5), (80, 144), ConvolutionConfig(columns, split, 2), residual=True)
    yield Convolution((2, 9, 9), (112, 48), ConvolutionConfig(64, 2, 4, early=False), stride=2, second=True)
    yield Convolution((1, 1, 1), (16, 16), ConvolutionConfig(32, 1, 2), kernel=1)
    yield Convolution((2, 8, 8), (64, 256), ConvolutionConfig(128, 1, 3, groups=2), residual=True, dtype=BFLOAT)
    yield Convolution((1, 14, 14), (128, 64), ConvolutionConfig(64, 8, 4), kernel=5, second=True, stride=2)
    for columns, split in ((32, 1), (32, 2), (64, 8)):
        yield Convolution((2, 5, 3), (144, 80), ConvolutionConfig(columns, split, 2), scale=3, residual=True)
    for late in (ConvolutionConfig(64, 1, 2), ConvolutionConfig(32, 4, 2), ConvolutionConfig(64, 2, 2, once=True)):
        yield Convolution((3, 7, 5), (144, 80), late, residual=True, late=True)
    yield Convolution((2, 5, 3), (144, 80), ConvolutionConfig(32, 2, 2), scale=3, residual=True, late=True)
    for wide, narrow in ((256, 64), (512, 128), (1024, 256)):
        yield Pair((3, 5, 7), (112, wide, narrow), second=wide == 512)
    for tile in stem_configs():  # a width of 40 takes copies of 16 bytes, one of 47 single numbers
        yield Stem((2, 33, 47 if tile.height == 4 else 40), tile)
    yield Stem((17, 65, 64), StemConfig(4, 4))  # more tiles than blocks
    for size in ((2, 33, 47), (33, 113, 96)):  # few tiles and more than blocks
        yield Stem(size, StemConfig(7, 8, warpgroups=True))
    for tile in (StemConfig(4, 8), StemConfig(7, 8, warpgroups=True)):
        yield Stem((17, 65, 52), tile, pooled=False)
    yield DoubleStem((2, 33, 40), DoubleStemConfig(8))
    yield DoubleStem((17, 65, 47), DoubleStemConfig(4))
    for mode in MODES:
        yield Ending((3, 7, 9), mode)
        yield Ending((2, 57, 13), mode, early=False, dtype=BFLOAT)
        yield Ending((7, 56, 56), mode)  # more tiles than multiprocessors
    yield Ending((1, 1, 1), FOLLOWED)
    for kind in (FLOAT, torch.uint8):  # read in words, and number by number
        yield Stem((1, 64, 64), StemConfig(4, 4), kind)
        yield Stem((2, 33, 47), StemConfig(7, 8), kind)
        yield Stem((17, 65, 52), StemConfig(4, 4), kind)  # more tiles than blocks
        yield DoubleStem((1, 64, 64), DoubleStemConfig(4), kind)
        yield DoubleStem((17, 65, 47), DoubleStemConfig(4), kind)
        yield DoubleStem((2, 33, 44), DoubleStemConfig(8), kind)


def convolution_native() -> Iterator[Case]:
    """The cases whose blocks keep to themselves."""
    return (case for case in _cases() if not _shares(case))


def convolution_cluster_native() -> Iterator[Case]:
    """The cases whose blocks send each other sums, by stores that a barrier of the receiver counts."""
    return (case for case in _cases() if _shares(case))


def _shares(case: Case) -> bool:
    return isinstance(case, Pair) or (isinstance(case, Convolution) and case.config.split > 1)
