"""The case of a head: a few float32 features of tokens in half precision, behind a layer norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.fused.basis import EPSILON, OURS, Rows, Run, floor, randn, tile_name
from fastmetro_kernels.fused import LinearConfig, fused_linear
from fastmetro_kernels.fused.linear.configs import NARROW, TILES, fitted


@dataclass(frozen=True)
class Head(Rows):
    """y = norm(x) @ weight.T + bias in float32: coordinates of mesh tokens, parameters of the camera.

    The op may round norm(x) to the dtype of x, by which the result is judged.
    """

    title: str
    features: int

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.title} (norm, float32)"

    @property
    def shape(self) -> str:
        """M x K x N."""
        return f"{super().shape} x {self.features}"

    def constants(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Weight [N, K] and bias [N] in float32."""
        weight = randn(generator, torch.float32, self.features, self.width) * self.width**-0.5
        return weight, randn(generator, torch.float32, self.features)

    def floor(self) -> float:
        """Seconds that moving the bytes takes at least; the products are few."""
        rows = self.batch * self.tokens
        return floor(rows * self.width, 0, self.dtype) + floor(rows * self.features, 0, torch.float32)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """PyTorch's cast, layer norm and product."""
        return F.linear(F.layer_norm(x.to(weight.dtype), (self.width,), eps=EPSILON), weight, bias)

    def _fused(self, config: LinearConfig | None) -> Run:
        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fused_linear(
                x, weight, bias, normalize=EPSILON, out_dtype=torch.float32, constant_weights=True, config=config
            )

        return run

    def ours(self) -> dict[str, Run]:
        """The fused op as the engine calls it."""
        return {OURS: self._fused(None)}

    def tiles(self) -> dict[str, Run]:
        """The fused op with every tile for float32 weights and for few features."""
        tiles = dict.fromkeys(fitted(tile, self.width) for tile in (*NARROW, *TILES[4]))
        return {tile_name(tile): self._fused(tile) for tile in tiles}
