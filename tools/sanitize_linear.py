"""`sanitize_cases.py`: the native linear layer and decoder tail. On CPUs, which have neither, the reference runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels.fused import (
    NativeLinearConfig,
    TailWeights,
    decoder_tail,
    fused_linear,
    fused_linear_moments,
)
from fastmetro_kernels.fused.linear.native import COLUMNS, SPLITS
from tools.sanitize_common import BFLOAT, FLOAT, HALF, TOLERANCE, compare


@dataclass(frozen=True)
class Linear:
    """One call of `fused_linear_moments`, one behind a norm that takes these moments, one that puts tokens in front."""

    rows: int
    width: int
    features: int
    config: NativeLinearConfig
    dtype: torch.dtype = HALF

    def run(self, backend: str, device: str) -> None:
        got = self._results(self.dtype, device, backend)
        for name, a, b in zip(("out", "behind", "led"), got, self._results(FLOAT, "cpu", "reference"), strict=True):
            compare(name, a, b, TOLERANCE[self.dtype])

    def _results(self, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.width)

        def normal(*size: int, scale: float = 1.0) -> Tensor:  # of the case's type, in whatever type it is computed
            return (scale * torch.randn(size, generator=generator)).to(self.dtype).to(device, dtype)

        native = device == "cuda" and backend == "native"
        options: dict[str, Any] = {"config": self.config, "backend": "native"} if native else {"backend": "reference"}
        x, weight = normal(1, self.rows, self.width), normal(self.features, self.width, scale=self.width**-0.5)
        residual, bias = normal(1, self.rows, self.features), normal(self.rows, self.features)
        out, moments = fused_linear_moments(x, weight, bias, residual=residual, **options)
        reader = normal(48, self.features, scale=self.features**-0.5)
        late = {"normalize": 1e-5, "moments": moments, "weight_sums": reader.float().sum(1)}
        behind = fused_linear(out, reader, normal(48), relu=True, constant_weights=True, **late, **options)
        led = fused_linear(x, weight, normal(self.features), leading=normal(1, 3, self.features), **options)
        return [out.cpu(), behind.cpu(), led.cpu()]


@dataclass(frozen=True)
class Tail:
    """One call of `decoder_tail`, with three parts of the hidden features."""

    samples: int
    queries: int
    keys: int
    dtype: torch.dtype = HALF

    def run(self, backend: str, device: str) -> None:
        native = device == "cuda" and backend == "native"
        got = self._result(self.dtype, device, "native" if native else "reference")
        compare("out", got, self._result(FLOAT, "cpu", "reference"), TOLERANCE[self.dtype])

    def _result(self, dtype: torch.dtype, device: str, backend: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.queries)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator)).to(self.dtype).to(device, dtype)

        sizes = [(128, 128)] * 3 + [(192, 128), (128, 192)]
        weights = [one for n, k in sizes for one in (normal(n, k, scale=k**-0.5), normal(n))]
        rows = (self.samples, self.queries, 128)
        k, v = normal(self.samples, self.keys, 2, 8, 16).unbind(2)
        return decoder_tail(normal(*rows), normal(*rows), k, v, TailWeights(*weights), backend=backend).cpu()


def linear_native() -> Iterator[Linear | Tail]:
    """The cases whose blocks keep to themselves, with rings that wrap around, at sizes that fill no tile."""
    yield from (case for case in _cases() if case.config.split == 1)
    yield Tail(3, 70, 49)
    yield Tail(1, 9, 64, BFLOAT)


def linear_cluster_native() -> Iterator[Linear]:
    """The cases whose blocks send each other sums."""
    return (case for case in _cases() if case.config.split > 1)


def _cases() -> Iterator[Linear]:
    for columns, split in product(COLUMNS, SPLITS):
        yield Linear(70, 528, 496, NativeLinearConfig(columns, split, 2))
    yield Linear(50, 512, 512, NativeLinearConfig(64, 1, 4, early=False), BFLOAT)
    yield Linear(1, 128, 128, NativeLinearConfig(32, 2, 2), BFLOAT)
