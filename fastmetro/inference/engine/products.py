"""The seam between the folded transformers and what computes them: linear layers with all around them, attention.

On a GPU in half precision a product of few rows, or of a narrow layer, takes less time than what surrounds it: launches
and trips through memory. There one fused kernel of ``fastmetro_kernels.fused`` does a layer norm, a product, bias, ReLU
and residual. A wide product of many rows is the library's (``python -m bench fused``), behind a norm of its own. Onto a
residual it adds where the tokens lie, without its bias: tokens remember what they lack, and the next norm adds it. A
transformer layer is two kinds of products: those that read the normalised tokens (`read`), and those that add to them
(`update`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.inference.engine import onednn
from fastmetro.inference.engine.onednn import WeightPacks
from fastmetro.models.attention import dense_attention
from fastmetro_kernels import fused
from fastmetro_kernels.backends import hopper_reasons
from fastmetro_kernels.fused.decoder_tail import native as tail
from fastmetro_kernels.fused.short_attention.configs import MAX_KEYS

FEW_ROWS = 512
"""Rows (tokens of all images) up to which every layer is fused."""
NARROW = 128
"""Features (of the input or of the output) up to which a layer is fused whatever the number of rows."""
RESIDUAL_WIDTH = 512
"""Features of the input up to which a layer with a residual is: the library would need a pass of its own for that."""
MANY_ROWS = 8_000
"""Rows from which the library also takes a layer with a residual, and one behind a norm from a narrow input to a wider
output."""
TAIL_ROWS = 14_000
"""Rows from which a narrow decoder layer is one kernel of Triton behind its self-attention: 30 microseconds instead of
43 with separate ones at 14,240 rows, 210 instead of 321 at 113,920, 20 instead of 12 at 445."""
NATIVE_TAIL_ROWS = 1_780
"""The same where the native kernel takes it: 13.4 microseconds instead of 22.0 at 1,780 rows, 12.9 instead of 11.5 at
445. Between these, where the separate kernels have other tiles than at either (up to 1,600 rows), nothing was timed."""
PACKED = 32_768
"""Numbers of a weight from which oneDNN's products of packed weights win on a CPU: from 128 x 384 on they take 0.63 to
0.95 of the time with 445 and 50 rows; with 128 x 128 as much."""
PLACES = 64
"""Tokens, at most, whose biases are columns of the weight: with many rows the norm then writes a 1 at the token's place
behind each row, and the product adds the bias. A tensor of biases for every row would be written and read instead."""
_FEW_FEATURES = 16
"""Outputs up to which float32 weights are fused, too: the heads'. They multiply without tensor cores there."""


class Layer(NamedTuple):
    """A linear layer of constants.

    Attributes:
        weight: [N, K].
        bias: [N] or, per token, [S, N].
        sums: float32 [N], of the rows of the weight, where it stands behind a layer norm; else None.
        marked: [N, K + PLACES], the weight and behind it the bias per token, where that stands behind a layer norm.
        packs: the weight in oneDNN's layouts, for the CPU.
    """

    weight: Tensor
    bias: Tensor
    sums: Tensor | None = None
    marked: Tensor | None = None
    packs: WeightPacks | None = None


class Tokens(NamedTuple):
    """Tokens between two layers.

    Attributes:
        values: [B, S, C].
        moments: [B, S, parts, 3], what a layer norm needs, where the kernel that made the tokens left it; see
            ``fused_linear_moments``.
        lacking: float32 [C] (float64 of such tokens), what still has to be added to each of them; None for nothing.
        constant: whether they are kept for later calls, the same for all images, so that nothing may be added in place.
    """

    values: Tensor
    moments: Tensor | None = None
    lacking: Tensor | None = None
    constant: bool = False

    def part(self, place: slice) -> Tokens:
        """Some of the tokens of each image."""
        moments = None if self.moments is None else self.moments[:, place]
        return self._replace(values=self.values[:, place], moments=moments)


def _few(x: Tensor) -> bool:
    return x.shape[0] * x.shape[1] <= FEW_ROWS


def _many(x: Tensor) -> bool:
    return x.shape[0] * x.shape[1] >= MANY_ROWS


def _fuses(x: Tensor, layer: Layer) -> bool:
    features, width = layer.weight.shape
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if layer.weight.dtype.itemsize == 4:
        return features <= _FEW_FEATURES
    return _few(x) or min(features, width) <= NARROW


def _fuses_read(tokens: Tokens, layer: Layer) -> bool:
    if tokens.lacking is not None or not _fuses(tokens.values, layer):
        return False
    one_pass = layer.bias.dim() == 1 or layer.marked is not None
    return not (_many(tokens.values) and one_pass and len(layer.weight) > NARROW)


def _fuses_update(x: Tensor, layer: Layer, residual: bool) -> bool:
    return _fuses(x, layer) or (residual and x.is_cuda and layer.weight.shape[1] <= RESIDUAL_WIDTH)


def _adds_in_place(x: Tensor, layer: Layer) -> bool:
    return x.is_cuda and x.dtype.itemsize == 2 and _many(x) and len(layer.weight) > NARROW


def _takes_marks(x: Tensor) -> bool:
    return x.is_cuda and x.dtype.itemsize == 2 and _many(x)


def read(tokens: Tokens, layer: Layer, epsilon: float, relu: bool = False) -> Tensor:
    """act(norm(x) W^T + b) of tokens x, in the dtype of W, to which x is cast.

    Args:
        tokens: x [B, S, K].
        layer: the constants, with the sums of the weight.
        epsilon: of the layer norm, which has neither gain nor bias.
        relu: whether act is ReLU.
    """
    x, (weight, bias, sums, *_) = tokens.values, layer
    if _fuses_read(tokens, layer):
        late = tokens.moments is not None
        return fused.fused_linear(
            x, weight, bias, normalize=epsilon, moments=tokens.moments, weight_sums=sums if late else None, relu=relu,
            out_dtype=weight.dtype, constant_weights=True,
        )  # fmt: skip
    if layer.marked is not None and _takes_marks(x):
        y = F.linear(
            fused.normalize_rows(x.to(weight.dtype), epsilon, shift=tokens.lacking, marks=PLACES), layer.marked
        )
        return y.relu_() if relu else y
    return _library_product(_normalized(x.to(weight.dtype), epsilon, tokens.lacking), layer, relu)


def update(x: Tensor, layer: Layer, residual: Tokens | None = None, leading: Tensor | None = None) -> Tokens:
    """The tokens x W^T + b + residual.

    Args:
        x: [B, S, K].
        layer: the constants.
        residual: [B, S, N]; is given up unless it is constant: the result may lie where it does.
        leading: [B, P, N] tokens that are put in front of the result's; not with a residual.
    """
    weight, bias = layer[:2]
    if residual is not None and _adds_in_place(x, layer):
        return _add_in_place(x, layer, residual)
    added = None if residual is None else residual.values
    if _fuses_update(x, layer, residual is not None):
        if _few(x) and len(weight) > NARROW:
            return Tokens(
                *fused.fused_linear_moments(x, weight, bias, residual=added, leading=leading, constant_weights=True)
            )
        return Tokens(fused.fused_linear(x, weight, bias, residual=added, leading=leading, constant_weights=True))
    y = _library_product(x, layer, relu=False, residual=added)
    return Tokens(y if leading is None else joined(leading, y))


def _add_in_place(x: Tensor, layer: Layer, residual: Tokens) -> Tokens:
    """One product of the library, which reads and overwrites the residual; the bias stays to be added."""
    weight, bias = layer[:2]
    values = residual.values
    if residual.constant:
        values = _repeated(values[:1], len(values))
    elif not values.is_contiguous():
        values = values.contiguous()
    values.view(-1, len(weight)).addmm_(x.reshape(-1, x.shape[-1]), weight.T)
    wide = torch.promote_types(bias.dtype, torch.float32)
    return Tokens(values, lacking=bias.to(wide) if residual.lacking is None else residual.lacking + bias)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Tokens [B, P, C] in front of tokens [B, S, C], contiguous."""
    if _has_words(first) and _has_words(second):
        return torch.cat([first.view(torch.int64), second.view(torch.int64)], dim=1).view(first.dtype)
    return torch.cat([first, second], dim=1)


def _repeated(x: Tensor, times: int) -> Tensor:
    """x [1, S, C] so many times."""
    if _has_words(x):
        return x.view(torch.int64).repeat(times, 1, 1).view(x.dtype)
    return x.repeat(times, 1, 1)


def _has_words(x: Tensor) -> bool:
    """Whether x can be copied in words of eight bytes: PyTorch copies half precision as many numbers at a time."""
    last, *others = reversed(x.stride())
    whole = all(number % 4 == 0 for number in (x.shape[-1], x.storage_offset(), *others))
    return x.dtype.itemsize == 2 and last == 1 and whole


def _normalized(x: Tensor, epsilon: float, lacking: Tensor | None) -> Tensor:
    if x.is_cuda or lacking is not None:
        return fused.normalize_rows(x, epsilon, shift=lacking)
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def _library_product(x: Tensor, layer: Layer, relu: bool, residual: Tensor | None = None) -> Tensor:
    """act(x W^T + b), or x W^T + b + residual. On a GPU bias and ReLU are the product's epilogue; a bias per token is
    there first."""
    weight, bias = layer[:2]
    if layer.packs is not None and weight.numel() >= PACKED and onednn.usable(x) and x.dtype == weight.dtype:
        return _packed_product(x, layer, layer.packs, relu, residual)
    if relu and x.is_cuda and bias.dim() == 1 and x.dtype.itemsize == 2:
        return torch._addmm_activation(bias, x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])
    if bias.dim() == 1:
        y = F.linear(x, weight, bias)
    else:
        y = _repeated(bias[None], len(x))  # a copy even of one image's: the sum goes where it lies
        y.view(-1, len(weight)).addmm_(x.reshape(-1, x.shape[-1]), weight.T)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def _packed_product(x: Tensor, layer: Layer, packs: WeightPacks, relu: bool, residual: Tensor | None) -> Tensor:
    """The same by oneDNN, which adds one tensor: a bias per token, or the residual."""
    weight, bias = layer[:2]
    packed = packs.linear(weight, x.shape[0] * x.shape[1])
    if bias.dim() == 2:
        y = onednn.linear(x, packed, None, relu, bias[None] if len(x) == 1 else _repeated(bias[None], len(x)))
        return y if residual is None else y.add_(residual)
    whole = residual is not None and residual.is_contiguous() and len(residual) == len(x)
    y = onednn.linear(x, packed, bias, relu, residual if whole else None)
    return y if residual is None or whole else y.add_(residual)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without mask to the tokens of an image: q [B, L, H, D], k and v [B, S, H, D] -> [B, L, H, D].

    The fused kernel is faster than any of the library's at every batch size that was measured (1 to 256).
    """
    if q.is_cuda and q.dtype.itemsize == 2 and k.shape[1] <= MAX_KEYS:
        return fused.short_attention(q, k, v)
    return dense_attention(q, k, v, 0.0)


def fuses_tail(tokens: Tensor, heads: int) -> bool:
    """Whether :func:`decoder_tail` takes a decoder layer of tokens [B, L, C] behind its self-attention."""
    if not tokens.is_cuda or tokens.dtype.itemsize != 2 or tokens.shape[2] > NARROW:
        return False
    native = (heads, tokens.shape[2]) == (tail.HEADS, tail.WIDTH)
    native = native and not hopper_reasons(tail.OPERATOR, tokens.device, tokens.dtype)
    return tokens.shape[0] * tokens.shape[1] >= (NATIVE_TAIL_ROWS if native else TAIL_ROWS)


def decoder_tail(
    tokens: Tokens, attended: Tensor, memory: Tensor, weights: fused.TailWeights, epsilons: tuple[float, float]
) -> Tokens:
    """A decoder layer behind its self-attention, in one kernel.

    Args:
        tokens: in front of the layer.
        attended: [B, L, H, D], of the self-attention.
        memory: keys and values [B, S, 2 C].
        weights: the layer's.
        epsilons: of the norms in front of the cross-attention and of the feed-forward block.
    """
    k, v = (x.unflatten(-1, attended.shape[2:]) for x in memory.chunk(2, -1))
    out = fused.decoder_tail(
        tokens.values, attended.flatten(-2), k, v, weights,
        cross_epsilon=epsilons[0], feed_forward_epsilon=epsilons[1], constant_weights=True,
    )  # fmt: skip
    return Tokens(out)
