"""What is measured: the linear layers and dense attentions of FastMETRO's transformers, and who computes them.

Widths 512 and 128 (feed-forward 2048 and 512), 8 heads; 50 tokens in the encoder, 49 image tokens, 445 in the decoder
(paper, section 3.2). Layers that only differ in name are measured once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.fused.basis import EPSILON, LATE, OURS, SEPARATE, Rows, Run, floor, native_name, randn, tile_name
from bench.fused.heads import Head
from bench.fused.pixels import Pixels
from fastmetro_kernels.backends import hopper_reasons
from fastmetro_kernels.fused import (
    LinearConfig,
    NativeLinearConfig,
    NormalizeConfig,
    ShortAttentionConfig,
    TailConfig,
    TailWeights,
    decoder_tail,
    fused_linear,
    fused_linear_moments,
    normalize_rows,
    short_attention,
)
from fastmetro_kernels.fused.decoder_tail.configs import TILES as TAIL_TILES
from fastmetro_kernels.fused.decoder_tail.native import OPERATOR as TAIL_OPERATOR
from fastmetro_kernels.fused.linear import native
from fastmetro_kernels.fused.linear.configs import TILES, fitted
from fastmetro_kernels.fused.normalize.configs import tiles as norm_tiles
from fastmetro_kernels.fused.short_attention.configs import TILES as ATTENTION_TILES

HEADS = 8
FEW_ROWS = 512
"""Up to which the engine fuses wide layers, and hands on moments."""
ENCODER, IMAGE, DECODER = 50, 49, 445
FLAGS = ("norm", "position", "relu", "residual")


def _moments(x: Tensor, part: int = 32) -> Tensor:
    """As `fused_linear_moments` gives them with tiles of 32 columns."""
    parts = x.float().unflatten(-1, (-1, part))
    mean = parts.mean(-1)
    squares = (parts - mean.unsqueeze(-1)).square().sum(-1)
    return torch.stack([torch.full_like(mean, part), mean, squares], -1)


@dataclass(frozen=True)
class Linear:
    """y = act(norm(x) @ weight.T + bias) + residual; the bias is one of every token where `position` is folded in."""

    title: str
    tokens: int
    width: int
    features: int
    batch: int
    dtype: torch.dtype
    norm: bool = False
    position: bool = False
    relu: bool = False
    residual: bool = False

    @property
    def name(self) -> str:
        """What it is, for people."""
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        return f"{self.title} ({', '.join(flags)})" if flags else self.title

    @property
    def shape(self) -> str:
        """M x K x N."""
        return f"{self.batch}*{self.tokens} x {self.width} x {self.features}"

    @property
    def _late(self) -> bool:
        """Whether the engine has the moments of the norm from the layer before: where that one is wide, and fused."""
        return self.norm and self.width > 128 and self.batch * self.tokens <= FEW_ROWS

    @property
    def activation_count(self) -> int:
        """How many tensors `activations` are."""
        return 1 + self.residual + self._late

    def activations(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """x [B, M, K], the residual [B, M, N] if there is one, and the moments of x that ours gets if it gets any."""
        sizes = [self.width, self.features] if self.residual else [self.width]
        found = [randn(generator, self.dtype, self.batch, self.tokens, size) for size in sizes]
        if self._late:
            found.append(_moments(found[0]))
        return tuple(found)

    def constants(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Weight [N, K], bias [N] or [M, N], and for ours the sums of the weight's rows."""
        bias = (self.tokens, self.features) if self.position else (self.features,)
        weight = randn(generator, self.dtype, self.features, self.width) * self.width**-0.5
        return weight, randn(generator, self.dtype, *bias), weight.float().sum(1)

    def floor(self) -> float:
        """Seconds that moving the bytes or multiplying takes at least, without anything else."""
        rows = self.batch * self.tokens
        elements = rows * (self.width + (1 + self.residual) * self.features) + self.features * self.width
        return floor(elements, 2 * rows * self.width * self.features, self.dtype)

    def plain(self, *tensors: Tensor) -> Tensor:
        """Layer norm, cuBLAS with bias, activation, residual. cuBLASLt has an epilogue for bias with ReLU: it is used
        where the bias is one of all tokens."""
        x, *residual, weight, bias, _ = tensors
        if self._late:
            residual.pop()
        if self.norm:
            x = F.layer_norm(x, (self.width,), eps=EPSILON)
        fused_relu = self.relu and not self.position and x.dtype != torch.float64  # for which cuBLASLt has none
        if self.position:
            y = F.linear(x, weight) + bias
        elif fused_relu:
            y = torch._addmm_activation(bias, x.flatten(0, 1), weight.T).unflatten(0, x.shape[:2])
        else:
            y = F.linear(x, weight, bias)
        if self.relu and not fused_relu:
            y = y.relu()
        return y + residual[0] if residual else y

    def _fused(self, config: LinearConfig | NativeLinearConfig | None, constant: bool) -> Run:
        def run(*tensors: Tensor) -> Tensor:
            x, *residual, weight, bias, sums = tensors
            moments = residual.pop() if self._late else None
            if self.residual and self.features > 128:  # its moments are wanted
                options: Any = {"residual": residual[0], "constant_weights": constant, "config": config}
                return fused_linear_moments(x, weight, bias, **options)[0]
            return fused_linear(
                x, weight, bias, normalize=EPSILON if self.norm else None, moments=moments,
                weight_sums=sums if self._late else None, relu=self.relu, residual=residual[0] if residual else None,
                constant_weights=constant, config=config,
            )  # fmt: skip

        return run

    def ours(self) -> dict[str, Run]:
        """The fused op as the engine calls it."""
        return {OURS: self._fused(None, True)}

    def tiles(self) -> dict[str, Run]:
        """The fused op with every tile of its table and of the native kernel, and without the promise of constant
        weights."""
        tiles = dict.fromkeys(fitted(tile, self.width) for tile in TILES[self.dtype.itemsize])
        found = {LATE: self._fused(None, False)} | {tile_name(tile): self._fused(tile, True) for tile in tiles}
        return found | {native_name(tile): self._fused(tile, True) for tile in self.native_tiles()}

    def native_tiles(self) -> list[NativeLinearConfig]:
        """Of few rows in half precision; a norm only where its moments are there."""
        if self.dtype.itemsize != 2 or self.batch * self.tokens > FEW_ROWS or self.norm != self._late:
            return []
        return native.usable(self.batch * self.tokens, self.features, self.width)


@dataclass(frozen=True)
class Attention:
    """Dense attention of 8 heads: k and v are slices of one wide projection, as the engine computes them."""

    title: str
    queries: int
    keys: int
    dim: int
    batch: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What it is, for people."""
        return self.title

    @property
    def shape(self) -> str:
        """Queries x keys x heads x dim."""
        return f"{self.batch}*{self.queries} x {self.keys} x {HEADS} x {self.dim}"

    @property
    def activation_count(self) -> int:
        """How many tensors `activations` are."""
        return 3

    def activations(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """q [B, L, H, D], k and v [B, S, H, D]."""
        k, v = randn(generator, self.dtype, self.batch, self.keys, 2, HEADS, self.dim).unbind(2)
        return randn(generator, self.dtype, self.batch, self.queries, HEADS, self.dim), k, v

    def constants(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Attention has none."""
        return ()

    def floor(self) -> float:
        """Seconds that moving the bytes or multiplying takes at least, without anything else."""
        width, pairs = HEADS * self.dim, self.queries * self.keys
        elements = self.batch * width * 2 * (self.queries + self.keys)
        return floor(elements, 4 * self.batch * pairs * width, self.dtype)

    def plain(self, *tensors: Tensor) -> Tensor:
        """SDPA, which chooses its fastest kernel."""
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def _fused(self, config: ShortAttentionConfig | None) -> Run:
        return lambda *tensors: short_attention(*tensors, config=config)

    def ours(self) -> dict[str, Run]:
        """The fused op as the engine calls it."""
        return {OURS: self._fused(None)}

    def tiles(self) -> dict[str, Run]:
        """The fused op with every tile of its table."""
        return {tile_name(tile): self._fused(tile) for tile in ATTENTION_TILES[self.dtype.itemsize]}


@dataclass(frozen=True)
class Tail:
    """All of a decoder layer of 128 features behind its self-attention."""

    batch: int
    dtype: torch.dtype
    queries: int = DECODER
    keys: int = IMAGE
    width: int = 128
    hidden: int = 512
    activation_count: int = 4
    name: str = "decoder layer behind its attention"

    @property
    def shape(self) -> str:
        """Tokens x features, keys, hidden features."""
        return f"{self.batch}*{self.queries} x {self.width}, {self.keys}, {self.hidden}"

    def activations(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Tokens and the output of the self-attention [B, L, C], k and v [B, S, H, D]."""
        k, v = randn(generator, self.dtype, self.batch, self.keys, 2, HEADS, self.width // HEADS).unbind(2)
        tokens, attended = (randn(generator, self.dtype, self.batch, self.queries, self.width) for _ in range(2))
        return tokens, attended, k, v

    def constants(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Those of TailWeights."""
        found: list[Tensor] = []
        for features, inner in [(self.width, self.width)] * 3 + [(self.hidden, self.width), (self.width, self.hidden)]:
            found.append(randn(generator, self.dtype, features, inner) * inner**-0.5)
            found.append(randn(generator, self.dtype, features))
        return tuple(found)

    def floor(self) -> float:
        """Seconds that moving the bytes or multiplying takes at least, without anything else."""
        rows, weights = self.batch * self.queries, 3 * self.width**2 + 2 * self.width * self.hidden
        elements = rows * 3 * self.width + self.batch * self.keys * 2 * self.width + weights
        return floor(elements, 2 * rows * (weights + 2 * self.keys * self.width), self.dtype)

    def plain(self, *tensors: Tensor) -> Tensor:
        """The layers one after the other, as strong as those of `Linear` and `Attention`."""
        x, attended, k, v, *constants = tensors
        out, query, cross, expand, contract = zip(constants[::2], constants[1::2], strict=True)
        x = x + F.linear(attended, *out)
        q = F.linear(F.layer_norm(x, (self.width,), eps=EPSILON), *query).unflatten(2, (HEADS, -1))
        values = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + F.linear(values.transpose(1, 2).flatten(2), *cross)
        normed = F.layer_norm(x, (self.width,), eps=EPSILON)
        if x.dtype == torch.float64:  # for which cuBLASLt has no epilogue
            return x + F.linear(F.linear(normed, *expand).relu(), *contract)
        hidden = torch._addmm_activation(expand[1], normed.flatten(0, 1), expand[0].T).unflatten(0, x.shape[:2])
        return x + F.linear(hidden, *contract)

    def _fused(self, config: TailConfig | None, backend: str = "auto") -> Run:
        def run(*tensors: Tensor) -> Tensor:
            weights = TailWeights(*tensors[4:])
            return decoder_tail(*tensors[:4], weights, constant_weights=True, config=config, backend=backend)

        return run

    def ours(self) -> dict[str, Run]:
        """The fused layer, and the fused ops that it replaces."""

        def separate(*tensors: Tensor) -> Tensor:
            x, attended, k, v, *constants = tensors
            out, query, cross, expand, contract = zip(constants[::2], constants[1::2], strict=True)
            x = fused_linear(attended, *out, residual=x, constant_weights=True)
            q = fused_linear(x, *query, normalize=EPSILON, constant_weights=True).unflatten(2, (HEADS, -1))
            x = fused_linear(short_attention(q, k, v).flatten(2), *cross, residual=x, constant_weights=True)
            hidden = fused_linear(x, *expand, normalize=EPSILON, relu=True, constant_weights=True)
            return fused_linear(hidden, *contract, residual=x, constant_weights=True)

        return {OURS: self._fused(None), SEPARATE: separate}

    def tiles(self) -> dict[str, Run]:
        """The fused layer with every tile of its table, and by the native kernel where it runs."""
        found = {tile_name(tile): self._fused(tile) for tile in TAIL_TILES[self.dtype.itemsize]}
        if torch.cuda.is_available() and not hopper_reasons(TAIL_OPERATOR, torch.device("cuda"), self.dtype):
            found["native"] = self._fused(None, "native")
        return found


@dataclass(frozen=True)
class Norm(Rows):
    """A layer norm of its own, as in front of a product of the library's."""

    name: str = "layer norm"

    def constants(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """There are none."""
        return ()

    def floor(self) -> float:
        """Seconds that moving the bytes takes at least."""
        return floor(2 * self.batch * self.tokens * self.width, 0, self.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """PyTorch's."""
        return F.layer_norm(x, (self.width,), eps=EPSILON)

    def ours(self) -> dict[str, Run]:
        """The fused op as the engine calls it."""
        return {OURS: lambda x: normalize_rows(x, EPSILON)}

    def tiles(self) -> dict[str, Run]:
        """The fused op with every tile for this width."""

        def with_tile(tile: NormalizeConfig) -> Run:
            return lambda x: normalize_rows(x, EPSILON, config=tile)

        return {tile_name(tile): with_tile(tile) for tile in norm_tiles(self.width)}


Case = Linear | Attention | Tail | Norm | Pixels | Head
"""A layer at one batch size: its inputs come in two parts, which rotate over sets of their own."""


def all_cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """Every linear layer and dense attention of FastMETRO-S and -L at one batch size, as the engine folds them, the
    heads, and the pixels in front of the backbone."""
    found: list[Case] = []
    for width, hidden in ((512, 2048), (128, 512)):
        first = width == 512
        reduced = 128 if first else 0  # what reads the first encoder's tokens also makes the second one's
        sizes: list[tuple[str, int, int, int, tuple[str, ...]]] = [  # title, M, K, N, what surrounds it
            ("readers of the encoder, S", IMAGE, width, 2 * width + reduced, ("norm", "position")),
            ("readers of the encoder, L", IMAGE, width, 6 * width + reduced, ("norm", "position")),
            ("decoder QKV", DECODER, width, 3 * width, ("norm",)),
            ("encoder QKV", ENCODER, width, 3 * width, ("norm", "position")),
            ("decoder cross Q", DECODER, width, width, ("norm",)),
        ]
        if first:
            sizes.append(("image features", IMAGE, 2048, width, ()))
            sizes.append(("reduction of mesh tokens", DECODER, width, 128, ("norm",)))
        for part, tokens in (("encoder", ENCODER), ("decoder", DECODER)):
            sizes += [
                (f"{part} output", tokens, width, width, ("residual",)),
                (f"{part} FF1", tokens, width, hidden, ("norm", "relu")),
                (f"{part} FF2", tokens, hidden, width, ("residual",)),
            ]
        for title, tokens, inputs, outputs, around in sizes:
            flags = {flag: flag in around for flag in FLAGS}
            found.append(Linear(title, tokens, inputs, outputs, batch, dtype, **flags))
        found.append(Attention("encoder attention", ENCODER, ENCODER, width // HEADS, batch, dtype))
        found.append(Attention("cross-attention", DECODER, IMAGE, width // HEADS, batch, dtype))
        found += [Norm(ENCODER, width, batch, dtype), Norm(DECODER, width, batch, dtype)]
    heads = [Head(DECODER, 128, batch, dtype, "coordinates", 3), Head(1, 128, batch, dtype, "camera", 3)]
    return [*found, Tail(batch, dtype), *heads, Pixels(batch, dtype)]
